import io
import os
import shutil
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dskd_keras import data
from dskd_keras.errors import InputError

tfds = pytest.importorskip("tensorflow_datasets")
pytest.importorskip("tensorflow")

from dskd_keras.data import tiny_imagenet  # noqa: E402

pytestmark = pytest.mark.once

SAMPLE = Path(__file__).resolve().parents[2] / "shared" / "tiny-imagenet-200-sample.zip"
# Label and colour of four classes, neither in the order of the labels nor in that of the colours.
CLASSES = {
    "n04254777": (149, (220, 40, 40)),  # sock
    "n01443537": (0, (40, 220, 40)),  # goldfish
    "n12267677": (199, (40, 40, 220)),  # acorn
    "n02403003": (49, (220, 220, 40)),  # ox
}
TRAIN, VALIDATION = 3, 2


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no name service")

    monkeypatch.setattr("socket.getaddrinfo", refuse)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)


def jpeg(colour, size=(64, 64), mode="RGB"):
    content = io.BytesIO()
    Image.new(mode, size, colour).save(content, "JPEG", quality=95)
    return content.getvalue()


def official_files():
    """The files of a small archive in the official layout, by name."""
    files = {"wnids.txt": "\n".join(CLASSES).encode()}
    for class_id, (_, colour) in CLASSES.items():
        for index in range(TRAIN):
            files[f"train/{class_id}/images/{class_id}_{index}.JPEG"] = jpeg(colour)
        files[f"train/{class_id}/{class_id}_boxes.txt"] = b"n_0.JPEG\t0\t0\t63\t63\n"
    lines = []
    for index in range(VALIDATION * len(CLASSES)):
        class_id = list(CLASSES)[-1 - index % len(CLASSES)]
        files[f"val/images/val_{index}.JPEG"] = jpeg(CLASSES[class_id][1])
        lines.append(f"val_{index}.JPEG\t{class_id}\t0\t0\t63\t63\n")
    files["val/val_annotations.txt"] = "".join(reversed(lines)).encode()
    files["test/images/test_0.JPEG"] = jpeg((0, 0, 0))
    return files


def write_folder(folder, files=None):
    for name, content in (files or official_files()).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def write_zip(path, files=None, top="tiny-imagenet-200/"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in (files or official_files()).items():
            archive.writestr(top + name, content)
    return path


def check_labels(images, labels, each):
    colours = images.mean(axis=(1, 2))
    expected = {label: colour for label, colour in CLASSES.values()}
    assert np.bincount(labels, minlength=200)[list(expected)].tolist() == [each] * len(expected)
    for colour, label in zip(colours, labels, strict=True):
        np.testing.assert_allclose(colour, expected[label], atol=4)


def block_means(images):
    """Averages over 8×8 pixels; images are [..., 64, 64, 3]."""
    return images.reshape(*images.shape[:-3], 8, 8, 8, 8, 3).mean(axis=(-4, -2))


def test_importing_the_module_registers_the_builder():
    assert tfds.builder_cls("tiny_imagenet") is tiny_imagenet.TinyImagenet
    assert "tiny_imagenet" in tfds.list_builders(with_community_datasets=False)


def test_what_the_builder_declares(tmp_path):
    builder = tfds.builder("tiny_imagenet", data_dir=tmp_path)
    assert str(builder.version) == "1.0.0"
    assert "1.0.0" in builder.release_notes
    assert builder.info.supervised_keys == ("image", "label")
    assert builder.info.features["image"].shape == (64, 64, 3)
    names = builder.info.features["label"].names
    assert len(set(names)) == len(names) == 200
    assert (names[0], names[49], names[199]) == ("goldfish, Carassius auratus", "ox", "acorn")
    ((url, archive),) = builder.url_infos.items()
    assert url == "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
    assert int(archive.size) == 248_100_043
    assert archive.checksum == "6198c8ae015e2b3e007c7841da39ec069199b9aa3bfa943a462022fe5e43c821"
    assert "Le, Ya and Yang, Xuan" in builder.info.citation


@pytest.mark.parametrize("kind", ["zip", "parent of zip", "folder", "parent of folder"])
def test_local_copies(tmp_path, kind):
    if "zip" in kind:
        source = write_zip(tmp_path / ("Tiny.ZIP" if kind == "zip" else "tiny-imagenet-200.zip"))
    else:
        source = write_folder(tmp_path / "tiny-imagenet-200")
    dataset = data.load(
        "tiny_imagenet", data_dir=source.parent if kind.startswith("parent") else source
    )
    assert dataset.name == "tiny_imagenet"
    assert dataset.input_shape == (64, 64, 3)
    check_labels(dataset.x_train, dataset.y_train, TRAIN)
    check_labels(dataset.x_test, dataset.y_test, VALIDATION)
    assert dataset.num_classes == 200
    assert dataset.class_names[149] == "sock"
    assert dataset.mean == (0.4802, 0.4481, 0.3975)
    assert dataset.std == (0.2302, 0.2265, 0.2262)
    assert dataset.augmentation == "crop_flip"
    assert "12 of 100,000 training and 8 of 10,000 validation images" in dataset.notes[0]
    assert "validation split is the test set" in dataset.notes[1]
    assert sorted(tmp_path.iterdir()) == sorted([source, tmp_path / "tiny_imagenet"])


def test_prepared_data_stands_for_all_copies_of_its_source(tmp_path, capfd):
    archive = write_zip(tmp_path / "tiny-imagenet-200.zip", top="")
    first = data.load("tiny_imagenet", data_dir=archive)
    assert f"preparing it from {archive}" in capfd.readouterr().err
    folder = write_folder(tmp_path / "other name")
    assert data.load("tiny_imagenet", data_dir=folder).fingerprint == first.fingerprint
    archive.unlink()
    shutil.rmtree(folder)
    assert data.load("tiny_imagenet", data_dir=tmp_path).fingerprint == first.fingerprint
    assert "preparing" not in capfd.readouterr().err


def test_another_source_is_refused(tmp_path):
    first = write_zip(tmp_path / "first.zip")
    data.load("tiny_imagenet", data_dir=first)
    files = official_files()
    del files["train/n01443537/images/n01443537_2.JPEG"]
    second = write_zip(tmp_path / "second.zip", files)
    with pytest.raises(InputError, match=r"data_dir: .* was prepared from") as caught:
        data.load("tiny_imagenet", data_dir=second)
    prepared = tmp_path / "tiny_imagenet" / "1.0.0"
    for path in (first, second, f"remove the folder {prepared}"):
        assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    shutil.rmtree(prepared)
    assert len(data.load("tiny_imagenet", data_dir=second).x_train) == 11


def test_labels_alone_make_another_source(tmp_path):
    files = official_files()
    first = tiny_imagenet.Source(write_zip(tmp_path / "first.zip", files))
    lines = files["val/val_annotations.txt"].decode().splitlines()
    lines[0] = lines[0].replace("n04254777", "n02403003")
    files["val/val_annotations.txt"] = "\n".join(lines).encode()
    second = tiny_imagenet.Source(write_zip(tmp_path / "second.zip", files))
    assert first.fingerprint != second.fingerprint


def test_a_folder_that_can_not_be_written_to(tmp_path, monkeypatch):
    archive = write_zip(tmp_path / "read_only" / "tiny.zip")
    # Not by permissions: the superuser has all of them.
    monkeypatch.setattr(os, "access", lambda path, mode: "read_only" not in str(path))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    home = tmp_path / "home" / "tensorflow_datasets"
    assert tiny_imagenet.find(archive)["data_dir"] == str(home)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "variable"))
    data.load("tiny_imagenet", data_dir=archive)
    assert (tmp_path / "variable" / "tiny_imagenet" / "1.0.0").is_dir()
    assert list(archive.parent.iterdir()) == [archive]
    # Data that is prepared there already is used.
    (tmp_path / "variable" / "tiny_imagenet").rename(archive.parent / "tiny_imagenet")
    assert tiny_imagenet.find(archive)["data_dir"] == str(archive.parent)


def test_the_folder_of_prepared_data_is_no_folder_of_classes(tmp_path, monkeypatch):
    write_folder(tmp_path / "tiny-imagenet-200")
    monkeypatch.chdir(tmp_path)
    for data_dir in ("tiny-imagenet-200", "."):
        assert len(data.load("tiny_imagenet", data_dir=data_dir).x_train) == 12


def test_grey_images_get_three_channels(tmp_path):
    files = official_files()
    for name in files:
        if name.startswith("train/n01443537/images/"):
            files[name] = jpeg(90, mode="L")
    dataset = data.load("tiny_imagenet", data_dir=write_zip(tmp_path / "tiny.zip", files))
    grey = dataset.x_train[dataset.y_train == 0]
    assert grey.shape == (TRAIN, 64, 64, 3)
    np.testing.assert_allclose(grey, 90, atol=1)


def test_with_tfds_alone(tmp_path):
    source = write_zip(tmp_path / "tiny.zip")
    splits, info = tfds.load(
        "tiny_imagenet", data_dir=tmp_path, builder_kwargs={"source": source}, with_info=True
    )
    assert {split: info.splits[split].num_examples for split in splits} == {
        "train": 12,
        "validation": 8,
    }
    examples = list(splits["train"].as_numpy_iterator())
    images, labels = (
        np.stack([example[key] for example in examples]) for key in ("image", "label")
    )
    check_labels(images, labels, TRAIN)


def test_the_download_is_checked(tmp_path, monkeypatch):
    archive = write_zip(tmp_path / "manual" / "tiny-imagenet-200.zip")
    config = tfds.download.DownloadConfig(manual_dir=archive.parent)
    builder = tfds.builder("tiny_imagenet", data_dir=tmp_path / "data")
    with pytest.raises(tfds.download.download_manager.NonMatchingChecksumError):
        builder.download_and_prepare(download_config=config)
    (url,) = builder.url_infos
    known = {url: tfds.download.checksums.compute_url_info(archive)}
    monkeypatch.setattr(tiny_imagenet.TinyImagenet, "url_infos", known)
    builder = tfds.builder("tiny_imagenet", data_dir=tmp_path / "data")
    builder.download_and_prepare(download_config=config)
    dataset = data.load("tiny_imagenet", data_dir=tmp_path / "data")
    check_labels(dataset.x_train, dataset.y_train, TRAIN)
    # The same archive by hand is the same source.
    tfds.builder("tiny_imagenet", data_dir=tmp_path / "data", source=archive).download_and_prepare()


IMAGE = "train/n04254777/images/n04254777_1.JPEG"
ANNOTATIONS = "val/val_annotations.txt"


def renamed(files, old, new):
    return {name.replace(old, new): content for name, content in files.items()}


def changed(files, name, *change):
    return files | {name: files[name].replace(*change)}


def without(files, start):
    return {name: content for name, content in files.items() if not name.startswith(start)}


@pytest.mark.parametrize("kind", ["zip", "folder"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda files: renamed(files, "n02403003", "n00000000"), "'n00000000' in the folder train"),
        (
            lambda files: changed(files, ANNOTATIONS, b"val_6.JPEG\tn", b"val_6.JPEG\tx"),
            f"unknown class 'x01443537' in line 2 of {ANNOTATIONS}",
        ),
        (
            lambda files: changed(files, ANNOTATIONS, b"\tn", b" n"),
            f"unknown class '0' in line 1 of {ANNOTATIONS}",
        ),
        (
            lambda files: changed(files, ANNOTATIONS, b"val_3.JPEG", b"val_30.JPEG"),
            f"val/images/val_3.JPEG without a line in {ANNOTATIONS}",
        ),
        (lambda files: without(files, "val/images/val_5"), "lacks val/images/val_5.JPEG"),
        (lambda files: without(files, ANNOTATIONS), f"has no {ANNOTATIONS}"),
        (lambda files: without(files, "train/"), "has no .JPEG images in train/CLASS/images"),
        # What scripts for torchvision's ImageFolder make of it.
        (
            lambda files: renamed(files, "val/images/", "val/n04254777/images/"),
            "has no .JPEG images in val/images",
        ),
        (lambda files: files | {IMAGE: files[IMAGE][:300]}, f"has {IMAGE}, which is no JPEG"),
        (
            lambda files: files | {IMAGE: jpeg((0, 0, 0), (32, 64))},
            f"has {IMAGE}, which is no JPEG image of 64×64 pixels (it has 32×64 pixels)",
        ),
    ],
)
def test_wrong_contents(tmp_path, kind, change, message):
    files = change(official_files())
    source = tmp_path / "tiny.zip"
    source = write_zip(source, files) if kind == "zip" else write_folder(tmp_path / "tiny", files)
    with pytest.raises(InputError) as caught:
        data.load("tiny_imagenet", data_dir=source)
    assert str(caught.value).startswith(f"data_dir: {source} ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "tiny_imagenet" / "1.0.0").exists()


def test_files_that_belong_to_no_class_are_passed_over(tmp_path):
    extra = {
        "val/images/._val_0.JPEG": b"",
        "val/images/.DS_Store": b"",
        f"{Path(IMAGE).parent.as_posix()}/._n04254777_1.JPEG": b"",
        "train/README": b"",
    }
    for files in (official_files() | extra, official_files()):
        archive = write_zip(tmp_path / f"{len(files)}.zip", files)
        with zipfile.ZipFile(archive, "a") as opened:
            opened.writestr("__MACOSX/tiny-imagenet-200/train/x/images/x.JPEG", b"")
    fingerprints = {tiny_imagenet.Source(path).fingerprint for path in tmp_path.glob("*.zip")}
    assert len(fingerprints) == 1


def test_damaged_archives(tmp_path):
    archive = write_zip(tmp_path / "tiny.zip")
    content = archive.read_bytes()
    archive.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match="can't be read as a zip archive") as caught:
        data.load("tiny_imagenet", data_dir=archive)
    assert str(archive) in str(caught.value)
    # One flipped bit, in the middle of one file.
    with zipfile.ZipFile(io.BytesIO(content)) as opened:
        start = opened.getinfo(f"tiny-imagenet-200/{IMAGE}").header_offset
    name_length, extra_length = struct.unpack_from("<HH", content, start + 26)
    flipped = bytearray(content)
    flipped[start + 30 + name_length + extra_length + 100] ^= 1
    archive.write_bytes(flipped)
    with pytest.raises(InputError, match=f"is damaged: {IMAGE} .*CRC") as caught:
        data.load("tiny_imagenet", data_dir=archive)
    assert str(archive) in str(caught.value)
    with pytest.raises(InputError, match=r"data_dir: there is no file .*none\.zip"):
        data.load("tiny_imagenet", data_dir=tmp_path / "none.zip")


def test_without_a_copy_and_a_network(tmp_path):
    with pytest.raises(InputError, match=r"no connection to .*cs231n\.stanford\.edu") as caught:
        data.load("tiny_imagenet", data_dir=tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "data_dir to tiny-imagenet-200.zip or to the folder" in str(caught.value)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["tiny-imagenet", "tinyimagenet", "TinyImageNet200"])
def test_close_names(tmp_path, name):
    with pytest.raises(InputError, match=r"Did you mean 'tiny_imagenet'"):
        data.load(name, data_dir=tmp_path)


@pytest.mark.skipif(not SAMPLE.is_file(), reason="no sample of Tiny ImageNet")
def test_the_sample(tmp_path):
    dataset = data.load("tiny_imagenet", data_dir=shutil.copy(SAMPLE, tmp_path))
    assert dataset.x_train.shape == (1600, 64, 64, 3)
    assert dataset.x_test.shape == (400, 64, 64, 3)
    assert np.bincount(dataset.y_train).tolist() == [8] * 200
    assert np.bincount(dataset.y_test).tolist() == [2] * 200
    top = "tiny-imagenet-200"
    with zipfile.ZipFile(SAMPLE) as archive:
        words = dict(
            line.split("\t") for line in archive.read(f"{top}/words.txt").decode().splitlines()
        )
        ids = sorted(archive.read(f"{top}/wnids.txt").decode().split())
        assert dataset.class_names == tuple(words[class_id] for class_id in ids)
        annotations = archive.read(f"{top}/val/val_annotations.txt").decode().splitlines()
        truth = {f"val/images/{line.split()[0]}": line.split()[1] for line in annotations}
        for part, images, labels in (
            ("train", dataset.x_train, dataset.y_train),
            ("val", dataset.x_test, dataset.y_test),
        ):
            # The stored order is TFDS's own, so each file is looked up by its pixels.
            blocks = block_means(images)
            found = set()
            for name in archive.namelist():
                if f"/{part}/" not in name or not name.endswith(".JPEG"):
                    continue
                class_id = name.split("/")[2] if part == "train" else truth[name[len(top) + 1 :]]
                pixels = np.asarray(Image.open(archive.open(name)).convert("RGB"))
                nearest = int(np.abs(blocks - block_means(pixels)).sum(axis=(1, 2, 3)).argmin())
                # TensorFlow's decoder rounds more than Pillow's.
                assert np.abs(images[nearest].astype(int) - pixels).max() <= 8, name
                assert ids[labels[nearest]] == class_id, name
                found.add(nearest)
            assert len(found) == len(images)
