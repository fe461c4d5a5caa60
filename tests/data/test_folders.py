"""Folders domain/class/image and CSV files: what is found, how it is split, and what is refused."""

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dmoe.data import folders
from dmoe.data.base import DomainDataset
from dmoe.data.files import ImageFiles
from dmoe.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from dmoe.errors import UserError
from dmoe.tasks import Task
from tests.told import one_line

ENOUGH = 10
"""Images of each class and domain."""

PACS = {domain: dict.fromkeys(("dog", "elephant", "guitar"), ENOUGH) for domain in ("art_painting", "cartoon", "photo", "sketch")}

OPTIONS: dict[str, Any] = {
    "target_domains": ["sketch"],
    "validation_domains": [],
    "validation_fraction": 0.2,
    "labels": "classes",
    "image_size": 8,
    "channels": 3,
    "augmentation": "none",
    "seed": 0,
    "skip_unreadable": False,
    "known_unreadable": None,
    "workers": 0,
}


def load(source: Path, **options: Any) -> DomainDataset:
    return folders.load(source, **{**OPTIONS, **options})


def refused(source: Path, **options: Any) -> str:
    """The one line that says what is wrong."""
    with pytest.raises(UserError) as caught:
        load(source, **options)
    return one_line(caught)


def draw(path: Path, shade: int = 0) -> None:
    """A small picture, all of one shade."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (8, 8), shade).save(path)


def make_tree(root: Path, content: Mapping[str, Mapping[str, int]] = PACS) -> Path:
    """So many pictures of each domain and class; those of class number c have the shade 10 c."""
    for domain, classes in content.items():
        for number, (name, count) in enumerate(classes.items()):
            for image in range(count):
                draw(root / domain / name / f"{image:03d}.png", shade=10 * number)
    return root


def make_table(folder: Path, header: str, rows: Iterable[str], *, pictures: bool = True) -> Path:
    """A CSV file, and a picture for the first field of each row."""
    table = folder / "images.csv"
    lines = list(rows)
    table.write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
    for line in lines if pictures else []:
        draw(folder / line.split(",")[0])
    return table


def rows_of(domains: Mapping[str, str], *, each: int = 6) -> list[str]:
    """Rows path,label,domain,split of some domains, each in one split; labels by turns cat and dog."""
    return [f"{d}_{i}.png,{('cat', 'dog')[i % 2]},{d},{split}" for d, split in domains.items() for i in range(each)]


def paths(dataset: DomainDataset, split: str) -> list[str]:
    images = dataset.splits[split]
    assert isinstance(images, ImageFiles)
    return [str(images.path(number)) for number in range(len(images))]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return make_tree(tmp_path / "pacs")


def test_folders_become_domains_and_classes(tree: Path) -> None:
    dataset = load(tree)
    assert (dataset.name, dataset.task, dataset.in_memory) == ("folders", Task("multiclass", num_outputs=3), False)
    assert list(dataset.class_names) == ["dog", "elephant", "guitar"]
    names = {0: "art_painting", 1: "cartoon", 2: "photo", 3: "sketch"}
    for split in dataset.splits.values():
        assert split.domain_names == names
        assert torch.equal(split.group_domains, split.domains)
    assert {name: sorted(split.members) for name, split in dataset.splits.items()} == {
        "source": [0, 1, 2],
        "validation": [0, 1, 2],
        "target": [3],
    }


def test_every_image_is_in_one_split_with_the_label_of_its_folder(tree: Path) -> None:
    dataset = load(tree)
    found = []
    for name, split in dataset.splits.items():
        assert isinstance(split, ImageFiles)
        for number, path in enumerate(paths(dataset, name)):
            domain, label = Path(path).relative_to(tree).parts[:2]
            assert dataset.class_names[int(split.labels[number])] == label
            assert split.domain_names[int(split.domains[number])] == domain
            found.append(Path(path))
    assert sorted(found) == sorted(tree.rglob("*.png"))


def test_images_are_those_of_the_files(tree: Path) -> None:
    split = load(tree, channels=1).splits["source"]
    shades = (255 * split.images(torch.arange(len(split)))).round().flatten(1)
    assert torch.equal(shades[:, 0], 10.0 * split.labels)


def test_channels_decide_shape_and_standardisation(tree: Path) -> None:
    colour, grey = load(tree, channels=3, image_size=12), load(tree, channels=1)
    assert (colour.image_shape, colour.transform.mean, colour.transform.std) == ((3, 12, 12), IMAGENET_MEAN, IMAGENET_STD)
    assert (grey.image_shape, grey.transform.mean, grey.transform.std) == ((1, 8, 8), (0.0,), (1.0,))
    assert colour.splits["target"].images(torch.tensor([0])).shape == (1, 3, 12, 12)


def test_accuracy_selects_and_macro_f1_is_reported_too(tree: Path) -> None:
    dataset = load(tree)
    assert dataset.selection_metric == "accuracy"
    assert dataset.reported == {"accuracy": "accuracy", "macro_f1": "macro F1"}
    labels = dataset.splits["target"].labels
    assert dataset.metrics("target", torch.arange(len(labels)), labels) == {"accuracy": 1.0, "macro_f1": 1.0}


def test_first_images_of_a_domain_are_of_all_classes(tmp_path: Path) -> None:
    split = load(make_tree(tmp_path, {d: dict.fromkeys("abcde", 40) for d in ("photo", "sketch")})).splits["target"]
    counts = torch.bincount(split.labels[:50], minlength=5)
    assert counts.min() >= 4
    assert counts.max() <= 18


def test_order_depends_on_the_names_alone(tree: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "copied"
    for path in sorted(tree.rglob("*.png"), reverse=True):
        draw(elsewhere / path.relative_to(tree))
    for split in ("source", "validation", "target"):
        there = [str(Path(path).relative_to(elsewhere)) for path in paths(load(elsewhere), split)]
        assert there == [str(Path(path).relative_to(tree)) for path in paths(load(tree), split)]


def test_another_domain_does_not_change_the_order_of_the_others(tree: Path) -> None:
    before = paths(load(tree), "target")
    make_tree(tree, {"clipart": {"dog": 5, "elephant": 5}})
    assert paths(load(tree), "target") == before


def test_deeper_folders_and_all_suffixes_are_images_and_nothing_else_is(tmp_path: Path) -> None:
    make_tree(tmp_path, {"photo": {"dog": 2, "cat": 2}, "sketch": {"dog": 1, "cat": 1}})
    wanted = [
        f"sketch/dog/deeper/still/x{suffix}" for suffix in (".JPG", ".jpeg", ".Png", ".bmp", ".gif", ".TIF", ".tiff", ".webp")
    ]
    wanted += ["sketch/dog/y.ppm", "sketch/dog/y.pgm"]
    for path in wanted:
        draw(tmp_path / path)
    (tmp_path / wanted[0]).rename(tmp_path / "sketch/dog/z.jfif")
    wanted[0] = "sketch/dog/z.jfif"
    others = ["sketch/dog/Thumbs.db", "sketch/dog/.DS_Store", "sketch/dog/._000.png", "sketch/notes.txt", "README.md", "cover.png"]
    others += [
        "sketch/.cache/dog/a.png",
        "__MACOSX/photo/dog/a.png",
        "empty/dog/readme",
        ".git/objects/a.png",
        "sketch/dog/data.npz",
    ]
    for path in others:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(b"")
    dataset = load(tmp_path)
    found = {str(Path(path).relative_to(tmp_path)) for path in paths(dataset, "target")}
    assert found == {*wanted, "sketch/dog/000.png", "sketch/cat/000.png"}
    assert list(dataset.splits["target"].domain_names.values()) == ["photo", "sketch"]


def test_linked_folders_are_followed_without_going_round_in_circles(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "tree", {"photo": {"dog": 3, "cat": 3}})
    make_tree(tmp_path / "elsewhere", {"sketch": {"dog": 2}, "more": {"cat": 2}})
    (tree / "sketch").symlink_to(tmp_path / "elsewhere" / "sketch")
    (tmp_path / "elsewhere" / "sketch" / "cat").symlink_to(tmp_path / "elsewhere" / "more" / "cat")
    (tree / "photo" / "dog" / "round").symlink_to(tree)
    (tree / "photo" / "dog" / "again").symlink_to(tree / "photo")
    (tree / "whole").symlink_to(tree)
    (tree / "photo" / "cat" / "self").symlink_to("self")
    dataset = load(tree)
    assert Counter(dataset.splits["target"].labels.tolist()) == {0: 2, 1: 2}
    assert len(dataset.splits["source"]) + len(dataset.splits["validation"]) == 6


def test_a_link_to_nowhere_is_an_image_that_cannot_be_read(tree: Path) -> None:
    (tree / "sketch" / "dog" / "lost.png").symlink_to(tree / "nowhere.png")
    with pytest.raises(UserError, match=r"lost\.png: no such image"):
        load(tree).splits["target"].images(torch.arange(3 * ENOUGH + 1))
    assert load(tree, skip_unreadable=True).unreadable == ["sketch/dog/lost.png"]


def test_a_class_may_be_missing_in_some_domains(tmp_path: Path) -> None:
    tree = make_tree(tmp_path, {"photo": {"dog": 5, "cat": 5}, "art": {"cat": 5, "bird": 5}, "sketch": {"dog": 3, "eel": 3}})
    dataset = load(tree)
    assert list(dataset.class_names) == ["bird", "cat", "dog", "eel"]
    assert set(dataset.splits["target"].labels.tolist()) == {2, 3}


def test_names_with_numbers_are_sorted_as_numbers(tmp_path: Path) -> None:
    classes = {"class 10": 4, "class 9": 4, "class 1": 4}
    dataset = load(make_tree(tmp_path, dict.fromkeys(("site 100", "site 20", "site 3"), classes)), target_domains=["site 20"])
    assert list(dataset.class_names) == ["class 1", "class 9", "class 10"]
    assert dataset.splits["target"].domain_names == {0: "site 3", 1: "site 20", 2: "site 100"}


def test_a_fifth_of_each_source_domain_is_held_out_at_random(tree: Path) -> None:
    dataset = load(tree)
    assert [len(members) for members in dataset.splits["validation"].members.values()] == [6, 6, 6]
    assert [len(members) for members in dataset.splits["source"].members.values()] == [24, 24, 24]
    assert set(paths(dataset, "validation")).isdisjoint(paths(dataset, "source"))


def test_what_is_held_out_depends_on_the_seed_of_the_data(tree: Path) -> None:
    torch.manual_seed(99)
    assert paths(load(tree), "validation") == paths(load(tree), "validation")
    assert paths(load(tree, seed=1), "validation") != paths(load(tree), "validation")
    assert paths(load(tree, seed=1), "target") == paths(load(tree), "target")


def test_domains_are_held_out_independently(tree: Path) -> None:
    held_out = [Path(path).relative_to(tree).parts for path in paths(load(tree), "validation")]
    of = {domain: {parts[1:] for parts in held_out if parts[0] == domain} for domain in ("art_painting", "cartoon", "photo")}
    assert of["art_painting"] != of["cartoon"] != of["photo"]


def test_small_domains_keep_an_image_and_give_one_where_they_have_two(tmp_path: Path) -> None:
    content = {"one": {"dog": 1}, "two": {"dog": 1, "cat": 1}, "three": {"dog": 2, "cat": 1}, "sketch": {"dog": 1}}
    dataset = load(make_tree(tmp_path, content), validation_fraction=0.9)
    names = dataset.splits["source"].domain_names
    sizes = {name: {names[d]: len(m) for d, m in dataset.splits[name].members.items()} for name in ("source", "validation")}
    assert sizes == {"source": {"one": 1, "two": 1, "three": 1}, "validation": {"two": 1, "three": 2}}


def test_a_small_fraction_still_holds_out_an_image_of_each_domain(tree: Path) -> None:
    dataset = load(tree, validation_fraction=0.001)
    assert [len(members) for members in dataset.splits["validation"].members.values()] == [1, 1, 1]


def test_named_validation_domains_are_validated_on_and_nothing_is_held_out(tree: Path) -> None:
    dataset = load(tree, validation_domains=["cartoon"])
    assert {name: sorted(split.members) for name, split in dataset.splits.items()} == {
        "source": [0, 2],
        "validation": [1],
        "target": [3],
    }
    assert {name: len(split) for name, split in dataset.splits.items()} == {"source": 60, "validation": 30, "target": 30}


def test_several_target_domains_are_tested_on(tree: Path) -> None:
    assert sorted(load(tree, target_domains=["photo", "sketch"]).splits["target"].members) == [2, 3]


@pytest.mark.parametrize(("augmentation", "views"), [("turns", 8), ("crops", 1)])
def test_source_images_alone_are_augmented(tree: Path, augmentation: str, views: int) -> None:
    for path in tree.rglob("*.png"):
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(path)
    dataset = load(tree, augmentation=augmentation)
    assert {name: split.views for name, split in dataset.splits.items()} == {"source": views, "validation": 1, "target": 1}
    for name, split in dataset.splits.items():
        index = torch.arange(8)
        assert torch.equal(split.images(index, draw=1), split.images(index)) == (name != "source")


def test_csv_rows_keep_their_order_and_are_found_beside_the_file(tmp_path: Path) -> None:
    rows = [row.rpartition(",")[0] for row in rows_of({"sketch": "", "photo": "", "art": ""})]
    dataset = load(make_table(tmp_path, "path,label,domain", rows))
    assert paths(dataset, "target") == [str(tmp_path / f"sketch_{number}.png") for number in range(6)]
    assert dataset.splits["target"].labels.tolist() == [0, 1] * 3
    assert (len(dataset.splits["source"]), len(dataset.splits["validation"])) == (10, 2)


def test_csv_may_have_other_columns_spaces_capitals_a_byte_order_mark_and_absolute_paths(tmp_path: Path) -> None:
    draw(tmp_path / "far" / "away.png")
    rows = [f"{i}, {('cat', 'dog')[i % 2]} ,x,photo,./a/{i}.png" for i in range(6)]
    rows += [f'6,cat,x,sketch,"{tmp_path}/far/away.png"', "", " , ,", '7,dog,x,sketch,"a/with, comma.png",,']
    for name in [*map(str, range(6)), "with, comma"]:
        draw(tmp_path / "a" / f"{name}.png")
    table = tmp_path / "Images.CSV"
    table.write_bytes("\r\n".join(["\ufeffid,Label,more,DOMAIN,path", *rows]).encode())
    dataset = load(table)
    assert list(dataset.class_names) == ["cat", "dog"]
    assert paths(dataset, "target") == [str(tmp_path / "far" / "away.png"), str(tmp_path / "a" / "with, comma.png")]


@pytest.mark.parametrize("words", [("source", "validation", "target"), ("train", "val", "test"), ("Train", "VAL", "Target")])
def test_a_column_split_decides(tmp_path: Path, words: tuple[str, str, str]) -> None:
    table = make_table(tmp_path, "path,label,domain,split", rows_of(dict(zip(("a", "b", "c"), words, strict=True))))
    dataset = load(table, target_domains=[])
    names = {name: [split.domain_names[domain] for domain in split.members] for name, split in dataset.splits.items()}
    assert names == {"source": ["a"], "validation": ["b"], "target": ["c"]}


def test_without_validation_rows_some_source_rows_are_held_out(tmp_path: Path) -> None:
    table = make_table(tmp_path, "path,label,domain,split", rows_of({"a": "train", "b": "train", "c": "test"}, each=10))
    dataset = load(table, target_domains=[])
    assert {name: len(split) for name, split in dataset.splits.items()} == {"source": 16, "validation": 4, "target": 10}


def test_validation_rows_may_be_of_source_domains(tmp_path: Path) -> None:
    rows = [row.replace("_0.png,cat,a,train", "_0.png,cat,a,val") for row in rows_of({"a": "train", "c": "test"})]
    dataset = load(make_table(tmp_path, "path,label,domain,split", rows), target_domains=[])
    assert paths(dataset, "validation") == [str(tmp_path / "a_0.png")]


def test_values_make_a_regression(tmp_path: Path) -> None:
    rows = [f"{d}{i}.png,{i - 0.5}e-1,{d}" for d in ("photo", "sketch") for i in range(5)]
    dataset = load(make_table(tmp_path, "path,label,domain", rows), labels="values")
    assert (dataset.task, dataset.class_names) == (Task("regression", num_outputs=1), [])
    assert dataset.splits["target"].labels.dtype == torch.float32
    assert torch.allclose(dataset.splits["target"].labels, torch.tensor([-0.05, 0.05, 0.15, 0.25, 0.35]))
    assert (dataset.selection_metric, dataset.reported) == ("r", {"r": "r", "mse": "mean squared error"})


def test_numbers_are_class_names_too(tmp_path: Path) -> None:
    rows = [f"{d}{i}.png,{7 + i},{d}" for d in ("photo", "sketch") for i in range(5)]
    assert list(load(make_table(tmp_path, "path,label,domain", rows)).class_names) == ["7", "8", "9", "10", "11"]


def test_unreadable_images_are_left_out_where_that_is_asked_for(tree: Path) -> None:
    bad = ["cartoon/dog/001.png", "sketch/guitar/000.png"]
    for path in bad:
        (tree / path).write_bytes(b"no picture")
    dataset = load(tree, skip_unreadable=True, workers=2)
    assert sorted(dataset.unreadable) == bad
    assert len(dataset.splits["target"]) == 3 * ENOUGH - 1
    assert len(dataset.splits["source"].members[1]) + len(dataset.splits["validation"].members[1]) == 3 * ENOUGH - 1
    assert all(str(tree / path) not in paths(dataset, split) for path in bad for split in dataset.splits)


def test_unreadable_images_that_are_known_are_left_out_without_reading(tree: Path) -> None:
    dataset = load(tree, skip_unreadable=True, known_unreadable=["sketch/dog/002.png", "gone/dog/1.png"])
    assert len(dataset.splits["target"]) == 3 * ENOUGH - 1


def test_a_domain_may_be_left_out_whole(tree: Path) -> None:
    bad = [f"photo/{path.parent.name}/{path.name}" for path in (tree / "photo").rglob("*.png")]
    dataset = load(tree, skip_unreadable=True, known_unreadable=bad)
    assert sorted(dataset.splits["source"].members) == [0, 1]
    assert len(dataset.class_names) == 3


def test_a_split_may_not_be_left_out_whole(tree: Path) -> None:
    bad = [f"sketch/{path.parent.name}/{path.name}" for path in (tree / "sketch").rglob("*.png")]
    told = refused(tree, skip_unreadable=True, known_unreadable=bad)
    assert "the target split has no image once the 30 that cannot be read are left out" in told


def test_missing_images_of_a_table_are_left_out_where_that_is_asked_for(tmp_path: Path) -> None:
    table = make_table(tmp_path, "path,label,domain,split", rows_of({"a": "train", "b": "test"}))
    (tmp_path / "b_3.png").unlink()
    assert load(table, target_domains=[], skip_unreadable=True).unreadable == ["b_3.png"]


def test_fingerprint_is_the_same_for_the_same_images_elsewhere(tree: Path, tmp_path: Path) -> None:
    assert load(make_tree(tmp_path / "elsewhere")).fingerprint == load(tree).fingerprint


def test_fingerprint_changes_with_files_splits_and_how_images_are_made(tree: Path) -> None:
    variants = [
        load(tree, **options).fingerprint
        for options in (
            {},
            {"seed": 1},
            {"target_domains": ["photo"]},
            {"validation_domains": ["photo"]},
            {"validation_fraction": 0.3},
            {"image_size": 9},
            {"channels": 1},
            {"augmentation": "turns"},
            {"skip_unreadable": True, "known_unreadable": ["photo/dog/000.png"]},
        )
    ]
    (tree / "sketch" / "dog" / "003.png").write_bytes(b"of another size")
    variants.append(load(tree).fingerprint)
    (tree / "sketch" / "dog" / "003.png").rename(tree / "sketch" / "elephant" / "new.png")
    variants.append(load(tree).fingerprint)
    (tree / "sketch").rename(tree / "drawing")
    variants.append(load(tree, target_domains=["drawing"]).fingerprint)
    assert len(set(variants)) == len(variants)


def test_fingerprint_changes_with_a_label_and_with_the_order_of_a_table(tmp_path: Path) -> None:
    rows = rows_of({"a": "train", "b": "test"})
    prints = []
    for changed in (rows, [*rows[:-1], rows[-1].replace("dog", "cat")], [*rows[1:], rows[0]]):
        prints.append(load(make_table(tmp_path, "path,label,domain,split", changed), target_domains=[]).fingerprint)
    assert len(set(prints)) == 3


def test_no_such_folder_is_told(tmp_path: Path) -> None:
    told = refused(tmp_path / "nowhere")
    assert told.startswith(f"{tmp_path / 'nowhere'}: no such folder or file")
    assert "domain/class/image" in told


def test_a_file_that_is_no_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pacs.zip").touch()
    assert "neither a folder nor a .csv file" in refused(tmp_path / "pacs.zip")


def test_without_target_domains_those_that_are_there_are_named(tree: Path) -> None:
    assert refused(tree, target_domains=[]) == (
        f"data.target_domains: name at least one of the domains to be tested on; {tree} holds art_painting, cartoon, photo, sketch"
    )


def test_of_many_domains_the_first_are_named(tmp_path: Path) -> None:
    told = refused(make_tree(tmp_path, {f"site {n}": {"dog": 1} for n in range(30)}), target_domains=[])
    assert told.endswith("site 10, site 11 and 18 others")


@pytest.mark.parametrize("field", ["target_domains", "validation_domains"])
def test_an_unknown_domain_is_told_with_the_nearest_one(tree: Path, field: str) -> None:
    told = refused(tree, **{field: ["sketches"]})
    assert f"data.{field}: 'sketches' is no domain of {tree}; did you mean 'sketch'?" in told
    assert "art_painting, cartoon, photo, sketch" in told


def test_a_folder_one_level_too_high_is_recognised(tree: Path) -> None:
    assert f"perhaps --data_dir is to be {tree}" in refused(tree.parent)


def test_a_domain_to_choose_on_cannot_be_tested_on(tree: Path) -> None:
    assert "data.validation_domains: 'sketch' is a target domain too" in refused(tree, validation_domains=["photo", "sketch"])


def test_a_domain_has_to_be_left_to_learn_from(tree: Path) -> None:
    told = refused(tree, target_domains=["sketch", "photo"], validation_domains=["cartoon", "art_painting"])
    assert f"no domain of {tree} is left to learn from" in told


def test_images_without_a_class_folder_are_refused(tree: Path) -> None:
    draw(tree / "photo" / "0.jpg")
    assert refused(tree) == f"{tree / 'photo' / '0.jpg'}: lies in no class folder; the layout is {tree}/domain/class/image"


@pytest.mark.parametrize("files", [[], ["cover.png"], ["photo/dog/notes.txt"], ["photo/dog/.hidden.png"]])
def test_a_folder_without_images_in_class_folders_is_refused(tmp_path: Path, files: list[str]) -> None:
    for path in files:
        draw(tmp_path / "x.png")
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "x.png").rename(tmp_path / path)
    assert refused(tmp_path).startswith(f"{tmp_path}: holds no images")


def test_one_class_is_nothing_to_tell_apart(tmp_path: Path) -> None:
    told = refused(make_tree(tmp_path, {"photo": {"dog": 5}, "sketch": {"dog": 5, "cat": 5}}))
    assert "all source images are of the class 'dog'" in told


def test_target_domains_without_any_known_class_are_refused(tmp_path: Path) -> None:
    told = refused(make_tree(tmp_path, {"photo": {"dog": 5, "cat": 5}, "sketch": {"eel": 5}}))
    assert "share no class with the source domains: eel; and cat, dog" in told


def test_folders_hold_no_values(tree: Path) -> None:
    assert f"data.labels: values are read from a CSV file, {tree} is a folder" in refused(tree, labels="values")


def test_a_folder_that_may_not_be_listed_is_told(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def scandir(folder: Path) -> Any:
        if folder == tree / "photo":
            raise PermissionError(13, "Permission denied")
        return listed(folder)

    listed = os.scandir
    monkeypatch.setattr(os, "scandir", scandir)
    assert refused(tree) == f"{tree / 'photo'}: cannot be listed: Permission denied"


def test_a_folder_whose_name_is_no_text_is_refused(tmp_path: Path) -> None:
    make_tree(tmp_path, {"photo": {"dog": 3, os.fsdecode(b"caf\xe9"): 3}, "sketch": {"dog": 3}})
    assert "is not UTF-8: rename it" in refused(tmp_path)


GOOD = ["a0.png,cat,a,train", "a1.png,dog,a,train", "b0.png,cat,b,test"]


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([*GOOD, "b1.png,,b,test"], "line 5: its label is empty"),
        ([*GOOD, "b1.png,cat"], "line 5: its domain is empty"),
        ([*GOOD, "b1.png,cat,b,"], "line 5: its split is empty"),
        ([*GOOD, "b1.png,cat,b,test,more"], "line 5: has 5 fields, the first line 4"),
        ([*GOOD, "b1.png,cat,b,holdout"], "line 5: the split 'holdout' is unknown; known: source, train, validation, val, target"),
        ([*GOOD, "a0.png,cat,c,test"], "line 5: a0.png is in line 2 already"),
        ([*GOOD, "./a0.png,cat,a,train"], "line 5: a0.png is in line 2 already"),
        ([*GOOD, "a2.png,cat,b,train"], "line 5: the domain 'b' has source rows and target ones"),
        ([*GOOD, "a2.png,cat,b,val"], "line 5: the domain 'b' has validation rows and target ones"),
        (GOOD[:2], "no row has target or test in its column split"),
        (GOOD[2:], "no row has source or train in its column split"),
        ([GOOD[0], "a1.png,cat,a,train", GOOD[2]], "all source images are of the class 'cat'"),
        ([], "holds no rows below its first line"),
        ([*GOOD, '"b1.png,cat,b,test'], "after line 4: unexpected end of data"),
        ([*GOOD, "x" * 200_000 + ",cat,b,test"], "after line 4: field larger than field limit"),
    ],
)
def test_what_is_wrong_in_a_table_is_told_with_its_line(tmp_path: Path, rows: list[str], told: str) -> None:
    table = make_table(tmp_path, "path,label,domain,split", GOOD)
    table = make_table(tmp_path, "path,label,domain,split", rows, pictures=False)
    answer = refused(table, target_domains=[], skip_unreadable=True, known_unreadable=[])
    assert answer.startswith(f"{table}: ")
    assert told in answer


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "empty; it needs a first line with the columns path,label,domain"),
        (b"\n  \n", "empty; it needs"),
        (b"path,class,domain\na.png,cat,a\n", "has no column label; its first line is 'path,class,domain'"),
        (b"path;label;domain\na.png;cat;a\n", "has no column path, label, domain"),
        (b"path,label,domain\na.png,c\xe9,a\n", "not UTF-8"),
    ],
)
def test_a_table_that_cannot_be_read_is_refused(tmp_path: Path, content: bytes, told: str) -> None:
    (tmp_path / "images.csv").write_bytes(content)
    assert refused(tmp_path / "images.csv").startswith(f"{tmp_path / 'images.csv'}: ")
    assert told in refused(tmp_path / "images.csv")


@pytest.mark.parametrize("value", ["cat", "nan", "inf", "1,5"])
def test_a_value_that_is_no_number_is_told_with_its_line(tmp_path: Path, value: str) -> None:
    rows = ["a0.png,1,a", "a1.png,2,a", f'b0.png,"{value}",sketch']
    table = make_table(tmp_path, "path,label,domain", rows)
    assert f"{table}: line 4: the label '{value}' is not a number" in refused(table, labels="values")


def test_values_that_are_all_equal_are_nothing_to_learn(tmp_path: Path) -> None:
    rows = [f"{d}{i}.png,2,{d}" for d in ("photo", "sketch") for i in range(5)]
    assert "all source images are labelled 2.0" in refused(make_table(tmp_path, "path,label,domain", rows), labels="values")


def test_a_missing_image_of_a_table_is_told_with_its_line(tmp_path: Path) -> None:
    table = make_table(tmp_path, "path,label,domain,split", rows_of({"a": "train", "b": "test"}))
    (tmp_path / "a_3.png").unlink()
    (tmp_path / "b_0.png").unlink()
    told = refused(table, target_domains=[])
    assert told.startswith(f"{table}: line 5: {tmp_path / 'a_3.png'} is not there (and 1 more)")
    assert "data.skip_unreadable=true" in told


@pytest.mark.parametrize("field", ["target_domains", "validation_domains"])
def test_domains_are_not_to_be_named_where_a_column_split_decides(tmp_path: Path, field: str) -> None:
    table = make_table(tmp_path, "path,label,domain,split", rows_of({"a": "train", "b": "test"}))
    assert f"data.{field}: {table} has a column split" in refused(table, **{"target_domains": [], field: ["b"]})


def test_no_image_left_to_validate_on_is_told(tmp_path: Path) -> None:
    tree = make_tree(tmp_path, {"a": {"dog": 1}, "b": {"cat": 1}, "sketch": {"dog": 1}})
    assert "the validation split has no image" in refused(tree)
