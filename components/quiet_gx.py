"""Great Expectations, which is told to be quiet before it is imported: it warns of what is not there, and reports."""

import logging
import os
import warnings

os.environ.setdefault("GX_ANALYTICS_ENABLED", "false")  # nothing leaves the machine
logging.getLogger("great_expectations").setLevel(logging.ERROR)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of optional packages that are not there
    import great_expectations as gx
    import great_expectations.expectations as gxe
    from great_expectations.render.renderer import ValidationResultsPageRenderer
    from great_expectations.render.view import DefaultJinjaPageView

__all__ = ["DefaultJinjaPageView", "ValidationResultsPageRenderer", "gx", "gxe"]
