"""Gradient-boosted trees, run in an environment of their own: `python lightgbm_peer.py IN.npz OUT.npz SEED… [--quick]`.

IN holds for the slices S, train, validation and test, `S_columns` (float32 `[rows, columns]`; categories are indices,
missing values NaN) and `S_labels` (`[rows, tasks]`), the names of the `tasks`, and which columns are categories: the
`small` and the `large`, of many values. OUT gets for each task the `TASK/setting` that was best by AUC on the
validation slice, and `TASK/S`: float64 `[seeds, rows]`, the logits of validation and test. Each run stops by its AUC on
the validation slice.
"""

import sys

import lightgbm
import numpy as np

ROUNDS, PATIENCE = 2000, 100
FIXED = {
    "objective": "binary",
    "metric": "auc",
    "num_threads": 2,
    "verbosity": -1,
    "feature_pre_filter": False,
    "bagging_freq": 1,
}
FIRST = {
    "ids": "left out",
    "num_leaves": 31,
    "min_data_in_leaf": 50,
    "learning_rate": 0.05,
    "feature_fraction": 0.6,
    "bagging_fraction": 0.8,
    "lambda_l2": 1.0,
}
"""Where the search begins; each of `SEARCH` is then tried in turn, with the best of what came before."""

AS_CATEGORIES = {"ids": "as categories", "cat_smooth": 10.0, "cat_l2": 10.0}
SEARCH = (
    [AS_CATEGORIES, AS_CATEGORIES | {"cat_smooth": 50.0, "cat_l2": 50.0, "max_cat_threshold": 16}],
    [{"num_leaves": 15}, {"num_leaves": 7}],
    [{"min_data_in_leaf": 200}],
    [{"feature_fraction": 0.3}],
    [{"lambda_l2": 20.0}],
    [{"learning_rate": 0.02}],
)


def main(source, target, seeds, quick):
    given = np.load(source)
    small, large = given["small"].tolist(), given["large"].tolist()
    width = given["train_columns"].shape[1]
    kept = {"as categories": list(range(width)), "left out": [place for place in range(width) if place not in large]}

    def columns(part, ids):
        return given[f"{part}_columns"][:, kept[ids]]

    def sets(ids, place):
        categories = [kept[ids].index(column) for column in small + large if column in kept[ids]]
        options = {"feature_pre_filter": False, "verbosity": -1}
        train = lightgbm.Dataset(
            columns("train", ids),
            given["train_labels"][:, place],
            categorical_feature=categories,
            params=options,
            free_raw_data=False,
        )
        return train, train.create_valid(columns("validation", ids), given["validation_labels"][:, place])

    out = {}
    rounds = 50 if quick else ROUNDS
    for place, task in enumerate(given["tasks"].tolist()):
        data = {ids: sets(ids, place) for ids in kept}

        def fit(setting, seed, data=data):
            train, validation = data[setting["ids"]]
            parameters = {name: value for name, value in setting.items() if name != "ids"}
            stop = lightgbm.early_stopping(PATIENCE, verbose=False)
            model = lightgbm.train(
                FIXED | parameters | {"seed": seed}, train, rounds, [validation], ["validation"], callbacks=[stop]
            )
            return model, model.best_score["validation"]["auc"]

        best, (_, value) = FIRST, fit(FIRST, 1)
        for changes in () if quick else SEARCH:
            for change, tried in [(change, best | change) for change in changes]:
                model, found = fit(tried, 1)
                print(f"{task}: {change}: {model.best_iteration} rounds, validation AUC {found:.4f}", flush=True)
                if found > value:
                    best, value = tried, found
        models = [fit(best, seed)[0] for seed in seeds]
        out[f"{task}/setting"] = np.array(
            " ".join(f"{name}={best[name]}" for name in best)
            + f" rounds={'/'.join(str(model.best_iteration) for model in models)}"
        )
        for part in ("validation", "test"):
            rows = columns(part, best["ids"])
            out[f"{task}/{part}"] = np.stack([model.predict(rows, raw_score=True) for model in models])
    np.savez(target, allow_pickle=False, **out)


if __name__ == "__main__":
    quick = "--quick" in sys.argv
    main(sys.argv[1], sys.argv[2], [int(seed) for seed in sys.argv[3:] if seed != "--quick"], quick)
