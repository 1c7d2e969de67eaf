"""What `train_packs` may name, and several plans as one dataset."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from open_qwen2vl.data import PackedDataset, PackMixture, PackOrder, Source, parse_sources, plan_packs
from open_qwen2vl.data.packing.plan_files import read_plan
from open_qwen2vl.data.packing.weights import describe_sources
from open_qwen2vl.processing.collator import PackingCollator


@pytest.fixture(scope="module")
def plans(tmp_path_factory, make_tar, sample, tokenizer) -> dict[str, str]:
    """Plans of two tars at 4 tokens an image, and of the second at 16."""
    root = tmp_path_factory.mktemp("plans")
    folders = {}
    for name, tar, budget, samples in (("cats", "a", 4, 30), ("dogs", "b", 4, 12), ("large", "b", 16, 12)):
        members = [member for i in range(samples) for member in sample(f"{i:03}", f"a {name[:-1]} " * (i % 5 + 1))]
        path = root / f"{tar}-{budget}.tar"
        plan_packs(
            [make_tar(path, members)], root / name, tokenizer, image_seq_length=budget, max_length=64, num_workers=1
        )
        folders[name] = str(root / name)
    return folders


def test_a_folder_is_one_source():
    assert parse_sources("packs/captions") == [Source("captions", "packs/captions", epochs=1.0)]
    assert parse_sources("packs/captions/")[0].name == "captions"


def test_a_list_names_sources_with_epochs_or_weights():
    entries = [{"path": "a"}, {"path": "b", "epochs": 2}, {"path": "c/a", "name": "c", "epochs": "0.5"}]
    assert parse_sources(entries) == [
        Source("a", "a", epochs=1.0),
        Source("b", "b", epochs=2.0),
        Source("c", "c/a", epochs=0.5),
    ]
    # YAML reads 1e1 as a word.
    entries = [{"path": "a", "weight": 3}, {"path": "b", "weight": "1e1"}]
    assert parse_sources(entries) == [Source("a", "a", weight=3.0), Source("b", "b", weight=10.0)]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("", "source 1 of the packs needs a `path`"),
        (None, "must be a folder or a list"),
        ([], "must be a folder or a list"),
        ({"path": "a"}, "must be a folder or a list"),
        (["a"], "source 1 of the packs needs a `path`, got 'a'"),
        ([{"path": "a"}, {"name": "b"}], "source 2 of the packs needs a `path`"),
        (
            [{"path": "a", "wieght": 1}],
            "unknown key 'wieght'; known are path, name, weight, epochs, weight_by,",
        ),
        ([{"path": "a", "weight": 1, "epochs": 1}], "source 1 of the packs has both a weight and epochs"),
        ([{"path": "a", "phase": 1}, {"path": "b"}], "source 'b' has no phase: give all of them one, or none"),
        ([{"path": "a", "phase": 1.5}], "phase of source 1 of the packs must be a whole number, got 1.5"),
        ([{"path": "a", "weight": 1}, {"path": "b"}], "source 'b' has no weight: give all of them one, or none"),
        ([{"path": "a", "epochs": 1}, {"path": "b", "weight": 1}], "source 'a' has no weight"),
        ([{"path": "x/a"}, {"path": "y/a"}], "two sources are named 'a'"),
        ([{"path": "a", "name": 3}], "has the name 3"),
        ([{"path": "a", "weight": 0}], "weight of source 1 of the packs must be a positive number, got 0"),
        ([{"path": "a", "epochs": -1}], "epochs of source 1 of the packs must be a positive number"),
        ([{"path": "a", "epochs": "many"}], "must be a positive number, got 'many'"),
        ([{"path": "a", "epochs": True}], "must be a positive number, got True"),
        ([{"path": "a", "epochs": float("inf")}], "must be a positive number"),
        ([{"path": "a", "epochs": float("nan")}], "must be a positive number"),
        ([{"path": "a", "weight": {0: 1, 1.5: 2}}], "a schedule goes from 0 to 1, the end of the run, got {0: 1, 1.5"),
        ([{"path": "a", "weight": {}}], "a schedule goes from 0 to 1"),
        ([{"path": "a", "weight": {0: 1, "0": 2}}], "a schedule has one weight at each share of the run"),
        (
            [{"path": "a", "weight": {0: 1, 1: -2}}],
            "weight of source 1 of the packs at 1 must be a number that",
        ),
        ([{"path": "a", "weight": {"soon": 1}}], "a share of the run in the weight of source 1 of the packs must be"),
        ([{"path": "a", "weight": {0: 0, 1: 0}}], "weight of source 1 of the packs is 0 all the time"),
        ([{"path": "a", "weight": {0: 1, 0.5: 0}}, {"path": "b", "weight": {0.2: 0, 0.7: 0, 1: 1}}], "at 0.5 of the"),
        ([{"path": "a", "weight": {0: 1, 1: 2}, "phase": 1}], "with a phase have neither max_epochs nor a schedule"),
        ([{"path": "a", "max_epochs": 2}], "has max_epochs without a weight"),
        (
            [{"path": "a", "weight": 1, "max_epochs": 0}],
            "max_epochs of source 1 of the packs must be a pos",
        ),
        ([{"path": "a", "loss_weight": -1}], "loss_weight of source 1 of the packs must be a positive number"),
    ],
)
def test_anything_else_is_one_clear_error(value, message):
    with pytest.raises(ValueError) as error:
        parse_sources(value)
    assert message in str(error.value)


def test_items_are_those_of_the_sources(plans, processor):
    mixture = PackMixture(parse_sources([{"path": plans["cats"]}, {"path": plans["dogs"]}]), processor)
    cats, dogs = (PackedDataset(plans[name], processor) for name in ("cats", "dogs"))
    assert mixture.names == ["cats", "dogs"] and len(mixture) == len(cats) + len(dogs)
    expected = [(0, cats, pack) for pack in range(len(cats))] + [(1, dogs, pack) for pack in range(len(dogs))]
    for index, (source, dataset, pack) in enumerate(expected):
        item, wanted = mixture[index], dataset[pack]
        assert (item["source"], item["pack"]) == (source, index)
        assert torch.equal(item["input_ids"], wanted["input_ids"])
        assert torch.equal(item["pixel_values"], wanted["pixel_values"])
        assert mixture.patches_per_pack[index] == item["media"] == len(item["pixel_values"])
        described = mixture.describe(index)
        assert (described["source"], described["pack"]) == (mixture.names[source], pack)
        documents = int((wanted["position_ids"] == 0).sum())
        assert len({key for _, key in described["documents"]}) == documents > 0
        assert all(tar.endswith(".tar") and key.isdigit() for tar, key in described["documents"])
    assert mixture.patches_per_pack.dtype == "int32" and mixture.patches_per_pack.sum() == 42


def test_behind_the_last_pack_stands_an_empty_one_of_each_source(plans, processor):
    mixture = PackMixture(parse_sources([{"path": plans["cats"]}, {"path": plans["large"]}]), processor)
    for source, budget in enumerate((4, 16)):
        item = mixture[len(mixture) + source]
        assert len(item["input_ids"]) == len(item["pixel_values"]) == 0
        assert (item["source"], item["image_seq_length"]) == (source, budget)
        assert mixture.describe(item["pack"]) == {"source": mixture.names[source], "pack": None, "documents": []}
    for index in (-1, len(mixture) + 2):
        with pytest.raises(IndexError):
            mixture[index]
    batch = PackingCollator()([mixture[0], mixture[len(mixture)]])
    stats, alone = batch["packing_stats"], PackingCollator()([mixture[0]])["packing_stats"]
    assert [stats[name] for name in ("tokens", "documents", "images")] == [
        alone[name] for name in ("tokens", "documents", "images")
    ]


def test_the_fingerprint_tells_mixtures_apart_but_not_their_places(plans, processor, tmp_path):
    def fingerprint(*entries):
        mixture = PackMixture(parse_sources(list(entries)), processor)
        return json.loads(json.dumps(mixture.fingerprint))

    cats, dogs = {"path": plans["cats"]}, {"path": plans["dogs"]}
    found = fingerprint(cats, dogs)
    assert set(found) == {"cats", "dogs"} and found["cats"]["epochs"] == 1.0
    others = [
        fingerprint(cats),
        fingerprint(cats, {**dogs, "epochs": 2}),
        fingerprint({**cats, "weight": 1}, {**dogs, "weight": 1}),
        fingerprint(cats, {**dogs, "path": plans["large"], "name": "dogs"}),
        fingerprint(cats, {**dogs, "loss_weight": 2}),
        *(
            fingerprint({**cats, "weight": 1}, {**dogs, "weight": weight, **limit})
            for weight, limit in ((1, {"max_epochs": 2}), ({0: 1, 1: 2}, {}), ({0: 1, 1: 3}, {}))
        ),
    ]
    assert all(other != found for other in others) and len({json.dumps(other) for other in others}) == len(others)
    # Moved: the tar lies beside the plan as before, elsewhere.
    for name in ("cats", "dogs"):
        shutil.copytree(plans[name], tmp_path / "moved" / name)
    for tar in ("a-4.tar", "b-4.tar"):
        shutil.copy2(plans["cats"] + f"/../{tar}", tmp_path / "moved" / tar)
    moved = [{"path": str(tmp_path / "moved" / name)} for name in ("cats", "dogs")]
    assert fingerprint(*moved) == found


def test_phases_are_read_in_their_order_and_hold_what_a_batch_can(plans, processor):
    def mixture(**phases):
        return PackMixture(parse_sources([{"path": plans[name], "phase": n} for name, n in phases.items()]), processor)

    found = mixture(large=2, cats=-1, dogs=2 - 1)
    assert found.phases == [[1], [2], [0]] and mixture(large=7, cats=3, dogs=3).phases == [[1, 2], [0]]
    sources = np.searchsorted(found._ends, [i for i in PackOrder(found, 1, 1, 1, seed=0) if i < len(found)], "right")
    assert list(dict.fromkeys(sources.tolist())) == [1, 2, 0]
    assert (
        found.fingerprint["large"]["phase"] == 2
        and "phase" not in PackMixture(parse_sources(plans["cats"]), processor).fingerprint["cats"]
    )
    with pytest.raises(
        ValueError, match="'cats' and 'large' are both of phase 1, .*image_seq_length 4, now 16 in the"
    ):
        mixture(cats=1, large=1)


def test_the_order_of_sources_belongs_to_the_fingerprint(plans, processor):
    entries = [{"path": plans["cats"]}, {"path": plans["dogs"]}]
    one, other = (PackMixture(parse_sources(order), processor).fingerprint for order in (entries, entries[::-1]))
    assert json.dumps(one) != json.dumps(other) and one != other


def test_weights_count_packs_tokens_or_samples_and_say_what_that_means(plans, processor):
    def read(unit):
        entries = [{"path": plans[name], "weight": 1, "weight_by": unit} for name in ("cats", "large")]
        sources = parse_sources(entries)
        mixture = PackMixture(sources, processor)
        order = PackOrder(mixture, 1, 1, 1, seed=0)
        packs = np.concatenate([list(order) for _ in map(order.set_epoch, range(8))])
        packs = packs[packs < len(mixture)]
        tokens = np.concatenate([dataset.per_pack("tokens") for dataset in mixture.datasets])
        first = packs < len(mixture.datasets[0])
        lines = describe_sources(sources, [dataset.plan for dataset in mixture.datasets])
        documents = [len(mixture.describe(int(pack))["documents"]) for pack in packs]
        return [
            np.sum(each[first]) / np.sum(each) for each in (np.ones(len(packs)), tokens[packs], np.array(documents))
        ], lines

    for place, unit in enumerate(("packs", "tokens", "samples")):
        shares, lines = read(unit)
        assert abs(shares[place] - 0.5) < 0.06, (unit, shares)
        assert lines[0].startswith("cats: ") and f"weight 1 of {unit}" in lines[1] and len(lines) == 2


def test_packs_of_different_lengths_are_warned_of(plans, tokenizer, tmp_path):
    sources = parse_sources([{"path": plans[name], "weight": 1} for name in ("cats", "dogs")])
    known = [read_plan(Path(source.path)) for source in sources]
    (*_, warning) = describe_sources(sources, [known[0], {**known[1], "max_length": 32}])
    assert warning.startswith("warning: packs are of 32 and 64 positions, and weights count packs")


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([{"path": "a", "weight": 1, "weight_by": "bytes"}], "weight_by of source 1 of the packs is packs, tokens or"),
        ([{"path": "a", "weight_by": "tokens"}], "weight_by of source 1 .* of sources with a weight"),
        ([{"path": "a", "weight": 1, "weight_by": "tokens"}, {"path": "b", "weight": 1}], "must be the same in all"),
    ],
)
def test_wrong_units_are_one_clear_error(entries, message):
    with pytest.raises(ValueError, match=message):
        parse_sources(entries)


def test_loss_weights_are_scaled_to_a_mean_of_one_over_the_labels(plans, processor):
    entries = [{"path": plans["cats"], "loss_weight": 3}, {"path": plans["dogs"], "epochs": 2}]
    mixture = PackMixture(parse_sources(entries), processor)
    cats, dogs = mixture.loss_weights
    labels = [dataset.plan["totals"]["labels"] for dataset in mixture.datasets]
    assert cats == pytest.approx(3 * dogs)
    assert (cats * labels[0] + dogs * 2 * labels[1]) / (labels[0] + 2 * labels[1]) == pytest.approx(1)
    items = [mixture[0], mixture[len(mixture) - 1]]
    batch = PackingCollator()(items)
    assert batch["loss_weights"].tolist() == pytest.approx([cats, dogs]) and batch["loss_weights"].shape == (2,)
    # The same for all is none.
    alike = PackMixture(parse_sources([{**entry, "loss_weight": 3} for entry in entries]), processor)
    assert alike.loss_weights is None and "loss_weights" not in PackingCollator()([alike[0]])
