from __future__ import annotations

import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import polars as pl
import pytest

from penstock import fusion, gate, metrics, report
from penstock.events import LABELS
from tests.penstock.candidates import Artifacts, write_candidate, write_release


class Page(HTMLParser):
    """Tags in balance, text, and every address that a browser would ask for."""

    void = frozenset({"meta", "br", "link", "img", "use", "path"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.addresses: list[str] = []
        self.pictures = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        self.pictures += tag == "svg"
        found = [value for name, value in attrs if name in ("src", "href", "xlink:href") and value]
        self.addresses += [address for address in found if not address.startswith(("#", "data:"))]
        if tag in self.void:
            self.open.remove(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.void:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.void:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "nav" not in self.open:  # the titles once more
            self.text.append(data)

    @property
    def words(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.text))


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_candidate(tmp_path_factory.mktemp("good"), rows=3000).root


@pytest.fixture
def candidate(good: Path, tmp_path: Path) -> Artifacts:
    shutil.copytree(good, tmp_path / "candidate")
    return Artifacts(tmp_path / "candidate")


@pytest.fixture(scope="session")
def champion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_release(tmp_path_factory.mktemp("releases") / "7", 7)


def reported(candidate: Artifacts, champion: Path | None = None, **policy: object) -> tuple[Page, report.Record, dict]:
    paths = (candidate.examples, candidate.recall, candidate.rank, candidate.weights, candidate.rehearsal)
    gate.judge_candidate(*paths, str(champion or ""), candidate.verdict, {"replicates": 100} | policy)
    out = candidate.root / "report.html"
    record = report.write_report(*paths[:4], candidate.verdict, out)
    page = Page(out.read_text())
    assert page.open == []
    assert page.addresses == []  # nothing is fetched from elsewhere
    assert "url(http" not in out.read_text()
    return page, record, json.loads((candidate.verdict / "verdict.json").read_text())


@pytest.fixture(scope="session")
def shown(good: Path, champion: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Page, report.Record, dict]:
    """The report on a good candidate, to read only."""
    root = tmp_path_factory.mktemp("shown") / "candidate"
    shutil.copytree(good, root)
    return reported(Artifacts(root), champion)


def test_a_report_says_what_the_verdict_found(shown: tuple[Page, report.Record, dict]) -> None:
    page, _, verdict = shown
    assert verdict["approved"]
    assert verdict["sentence"] in page.words
    for check in verdict["checks"]:
        assert check["name"] in page.words
        assert check["reason"] in page.words
    for head in verdict["heads"].values():
        for figure in ("auc", "champion", "popularity"):
            assert f"{head[figure]:.4f}" in page.words
        assert f"{head['difference_low']:+.4f} to {head['difference_high']:+.4f}" in page.words
    for one in verdict["slices"]:
        assert one["name"] in page.words
    # AUCs, three ROC and three calibration curves, three fronts and the grid, recall, slices, training and the gates
    assert page.pictures == 1 + 3 + 3 + 3 + 1 + 1 + 1 + 3
    assert "rollback" in page.words
    assert "release back (7)" in page.words


def test_what_changed_since_the_champion_is_what_differs(shown: tuple[Page, report.Record, dict]) -> None:
    page, _, _ = shown
    changed = page.words.split("What changed since the champion")[1].split("How to roll back")[0]
    assert "approved by reviewer" in changed
    assert "recall.config.dim 16 32" in changed
    assert "rank.config.settings.epochs 1 2" in changed
    assert "rank.config.experts" not in changed
    assert "rows.train 4,000 3,000" in changed
    assert "rank model device position" in changed
    assert "recall model" not in changed  # it reads what it read
    assert "forced" not in changed
    assert "recall@50 0.3000 0.3100" in changed


def test_a_champion_that_was_forced_says_so(candidate: Artifacts, champion: Path, tmp_path: Path) -> None:
    forced = {"by": "ana", "reason": "the <audit> asks for it", "verdict": "Rejected: it is worse."}
    live = shutil.copytree(champion, tmp_path / "7")
    manifest = json.loads((live / "manifest.json").read_text())
    manifest = {name: value for name, value in manifest.items() if name != "inputs"} | {"forced": forced}
    (live / "manifest.json").write_text(json.dumps(manifest))
    page, _, _ = reported(candidate, live)
    said = (
        "The champion was forced against the gate by ana: “the <audit> asks for it”. The gate had said: Rejected: it is"
    )
    assert said in page.words
    assert "the champion's manifest does not name what its models read" in page.words


def test_the_primary_figure_stands_with_interval_and_p_value(shown: tuple[Page, report.Record, dict]) -> None:
    page, _, verdict = shown
    found = verdict["primary"]
    ends = found["difference"]
    told = (
        f"Mean AUC {found['candidate']:.4f} {found['opponent_value']:.4f} {ends['value']:+.4f} "
        f"{ends['low']:+.4f} to {ends['high']:+.4f} {found['p_value']:.2g}"
    )
    assert told in page.words.split("Primary figure")[1].split("Checks")[0]


def test_another_policy_shows_as_one(candidate: Artifacts, champion: Path) -> None:
    page, _, verdict = reported(candidate, champion, primary="gauc_click", margin=0.002)
    primary = page.words.split("Primary figure")[1].split("Checks")[0]
    assert f"GAUC of click {verdict['primary']['candidate']:.4f}" in primary
    assert "users drawn again with all of their rows, 100 times, which gives no p-value" in primary
    policy = page.words.split("Policy of the gate")[1]
    assert "with ≠: 3 of " in policy
    changed = "≠ replicates 100 default 500 ≠ primary gauc_click default mean_auc ≠ margin 0.002 default 0.001"
    assert f"{changed} confidence 0.95 seed" in policy


def test_recall_calibration_and_rehearsal_are_told(shown: tuple[Page, report.Record, dict]) -> None:
    page, record, verdict = shown
    recall = page.words.split("Who recommends")[1].split("Slices")[0]
    for name, words in (("candidate", "candidate"), ("champion", "champion 7"), ("item_item_cf", "item-item CF")):
        found = verdict["recall"][name]
        assert f"{words} {found['recall@50']:.4f} {found['low']:.4f} to {found['high']:.4f}" in recall
    for label, head in verdict["heads"].items():
        ends = f"{head['calibration_slope_low']:.3f} to {head['calibration_slope_high']:.3f}"
        assert f"{head['calibration_slope']:.3f} {ends}" in page.words, label
    rehearsal = page.words.split("Rehearsal")[1].split("What changed")[0]
    for name in gate.REHEARSED:
        assert f"✓ pass {name}" in rehearsal
    assert "2e-07" in rehearsal
    assert record.metrics["primary/difference/value"] == verdict["primary"]["difference"]["value"]
    assert record.metrics["recall_of/champion/recall@50"] == verdict["recall"]["champion"]["recall@50"]


def test_the_weights_are_told_with_their_optimism_the_reference_and_the_front(
    candidate: Artifacts, champion: Path
) -> None:
    objective = {"auc_click": 1, "gauc_like": 3}
    config = fusion.Config("weighted_logits", "simplex", 12, objective=objective, constraints={"auc_like": 0.02})
    found = fusion.search_predictions(candidate.rank, candidate.weights, config, str(champion))
    page, _, _ = reported(candidate, champion)
    words = page.words.split("Output weights")[1].split("Recall")[0]
    test = pl.read_parquet(candidate.test_predictions)
    scores = fusion.fuse({label: test[f"p_{label}"] for label in LABELS}, found.weights, "weighted_logits")
    auc = metrics.auc(test["click"], scores)
    value = (auc + 3 * metrics.gauc(test["like"], scores, test["user_id"])) / 4
    mix = ", ".join(f"{name} {weight:.4g}" for name, weight in found.weights.items())
    assert f"{mix} {found.value:.4f} {value:.4f} {found.value - value:+.4f}" in words
    assert "by the mean of AUC click × 1, GAUC like × 3: the best of 91 of the 91 mixes" in words
    assert "Measure Chosen Champion 7 Difference May fall by" in words
    live, like = found.reference_measures["auc_like"], found.measures["auc_like"]
    assert f"AUC like {like:.4f} {live:.4f} {like - live:+.4f} 0.02" in words
    assert "Champion 7 is click 1, long_view 1, like 1 (weighted sum), applied" in words
    pictures = {path.name for path in (candidate.root / "figures").iterdir()}
    assert {"pareto_front_of_auc_click_and_auc_like.svg", "objective_over_the_weight_grid.svg"} <= pictures


def test_weights_below_nought_have_no_triangle_and_any_grid_a_page_of_some_size(candidate: Artifacts) -> None:
    fusion.search_predictions(candidate.rank, candidate.weights, fusion.Config(grid="signed", steps=8))
    page, _, _ = reported(candidate)
    assert page.pictures == 1 + 3 + 3 + 3 + 1 + 3
    assert "All weights equal is click 1, long_view 1, like 1" in page.words
    assert (candidate.root / "report.html").stat().st_size < 1_500_000


def test_a_first_release_has_nothing_to_go_back_to(candidate: Artifacts) -> None:
    page, record, _ = reported(candidate)
    assert "this would be the first release" in page.words
    assert "no release before this one to go back to" in page.words
    assert record.params["champion"] is None


@pytest.mark.parametrize("spoil", ["NaN", "one class", "no champion"])
def test_a_rejected_candidate_is_reported_as_far_as_it_goes(candidate: Artifacts, champion: Path, spoil: str) -> None:
    if spoil == "NaN":
        candidate.change(candidate.test_predictions, p_like=pl.lit(float("nan")))
    if spoil == "one class":
        for path in (candidate.test_predictions, candidate.examples / "test.parquet"):
            candidate.change(path, like=pl.lit(0, pl.Int8))
    release = candidate.root / "gone" if spoil == "no champion" else champion
    page, record, verdict = reported(candidate, release)
    assert not verdict["approved"]
    assert verdict["sentence"] in page.words
    assert "✗ fail" in page.words
    assert record.metrics["approved"] == 0
    assert "would be the first release" not in page.words
    if spoil == "NaN":
        assert "like: 3000 of 3000 scores are NaN or infinite" in page.words


def test_the_record_holds_parameters_and_finite_figures(shown: tuple[Page, report.Record, dict]) -> None:
    _, record, verdict = shown
    assert record.params["rank.model"] == "mmoe"
    assert record.params["recall.config.dim"] == 32
    assert record.params["champion"] == 7
    assert set(record.params) >= {"weight.click", "weight.long_view", "weight.like", "window.test_end"}
    assert all(math.isfinite(value) for value in record.metrics.values())
    assert record.metrics["fused/candidate/value"] == verdict["fused"]["candidate"]["value"]
    assert record.metrics["head/like/champion"] == verdict["heads"]["like"]["champion"]
    assert record.metrics["recall/popularity/test/recall@50"] == 0.22
    assert all(re.fullmatch(r"[\w@/.-]+", name) for name in record.metrics)
    assert [path.name for path in record.files] == ["report.html", "figures", "verdict.json", "weights.json"]
    assert all(path.exists() for path in record.files)
    pictures = sorted(path.name for path in record.files[1].iterdir())
    assert {"auc_of_each_head_with_its_interval.svg", "roc_of_click.svg", "calibration_of_like.svg"} <= set(pictures)
    assert "shares_of_experts_by_task.svg" in pictures
    assert len(pictures) == record.files[0].read_text().count("<figure>")
    for picture in record.files[1].iterdir():
        assert ElementTree.parse(picture).getroot().tag == "{http://www.w3.org/2000/svg}svg"


def test_text_from_artifacts_is_escaped(candidate: Artifacts) -> None:
    config = {"model": "<script>alert(1)</script>", "config": {}, "seed": 1}
    (candidate.rank / "config.json").write_text(json.dumps(config))
    reported(candidate)
    assert "<script" not in (candidate.root / "report.html").read_text()


def test_the_same_candidate_gives_the_same_page(candidate: Artifacts) -> None:
    reported(candidate)
    first = (candidate.root / "report.html").read_text()
    reported(candidate)
    assert (candidate.root / "report.html").read_text() == first
