"""Files of codes: what is written comes back, and what does not fit is named."""

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from vqfast.data import open_source
from vqfast.data.codes import claims, encoder_digest, open_codes, read_codes, save_codes
from vqfast.errors import DataError
from vqfast.models.vqgan import VQGAN, VQGANConfig


def grids(n, *shape, top=9):
    return torch.randint(0, top, (n, *shape))


def test_codes_come_back_in_a_small_type(tmp_path):
    codes = grids(6, 3, 4, top=1000)
    save_codes(tmp_path / "c.safetensors", codes, torch.arange(6) % 3, n_codes=1000, encoder="abc")
    data = open_codes(tmp_path / "c.safetensors")
    assert data.codes.dtype == torch.int16 and data.grid == (3, 4) and len(data) == 6
    assert data.about["n_codes"] == "1000" and data.about["encoder"] == "abc"
    assert data.class_names == ["0", "1", "2"]
    got = data.rows(torch.tensor([4, 0]))
    assert got["codes"].dtype == torch.int64
    assert torch.equal(got["codes"], codes[[4, 0]].flatten(1))
    assert got["label"].tolist() == [1, 0]


@pytest.mark.parametrize(("top", "dtype"), [(2**15 - 1, torch.int16), (2**15, torch.int32)])
def test_the_stored_type_holds_the_greatest_code(tmp_path, top, dtype):
    save_codes(tmp_path / "c.safetensors", torch.full((1, 1, 1), top))
    data = open_codes(tmp_path / "c.safetensors")
    assert data.codes.dtype == dtype and int(data.codes) == top


def test_encodings_names_and_condition_stay_with_their_picture(tmp_path):
    codes, condition = grids(4, 2, 3, 3), grids(4, 2, 5)
    save_codes(
        tmp_path / "c.safetensors",
        codes,
        torch.tensor([0, -1, 1, 0]),
        condition,
        names=["a", "b", "ü", "d"],
        class_names=["cat", "dog"],
    )
    some = open_codes(tmp_path / "c.safetensors").select(torch.tensor([2, 0]).numpy())
    assert some.class_names == ["cat", "dog"] and some.names == ["ü", "a"]
    got = some.rows(torch.tensor([0, 1]), torch.tensor([1, 0]))
    assert torch.equal(got["codes"], torch.stack([codes[2, 1], codes[0, 0]]).flatten(1))
    assert torch.equal(got["condition"], torch.stack([condition[2, 1], condition[0, 0]]))
    assert got["label"].tolist() == [1, 0]


def test_pictures_of_several_sizes_can_be_read_but_make_no_data_set(tmp_path):
    mixed = [grids(2, 3)[:, :3], grids(3, 2), grids(2, 3)]
    save_codes(tmp_path / "c.safetensors", mixed)
    read = read_codes(tmp_path / "c.safetensors").grids
    assert all(torch.equal(a[0, 0], b) for a, b in zip(read, mixed, strict=True))
    with pytest.raises(DataError, match="one size"):
        open_codes(tmp_path / "c.safetensors")


def test_a_folder_is_all_its_files_in_order_and_its_folders_are_classes(tmp_path):
    parts = {"dog/a": grids(2, 2, 2), "cat/b": grids(3, 2, 2, top=2**16), "cat/a": grids(1, 2, 2)}
    for name, codes in parts.items():
        save_codes(
            tmp_path / f"{name}.safetensors", codes, names=[f"{name}{i}" for i in range(len(codes))]
        )
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "c.safetensors").write_bytes(b"no codes")
    data = open_codes(tmp_path)
    assert torch.equal(
        data.codes[:, 0], torch.cat([parts["cat/a"], parts["cat/b"], parts["dog/a"]])
    )
    assert data.labels.tolist() == [0, 0, 0, 0, 1, 1] and data.class_names == ["cat", "dog"]
    assert data.name(3) == b"cat/b2"
    save_codes(tmp_path / "dog/b.safetensors", grids(1, 2, 2), torch.tensor([4]))
    data = open_codes(tmp_path)  # labels in a file are stronger than folders
    assert data.labels.tolist() == [-1] * 6 + [4] and data.names is None


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        (
            (grids(1, 2, 2), {}),
            (grids(1, 2, 3), {}),
            r"b\.safetensors: .* of one size",
        ),
        ((grids(1, 2, 2), {}), (grids(1, 2, 2, 2), {}), "one size"),
        ((grids(1, 2, 2), {"encoder": "x"}), (grids(1, 2, 2), {"encoder": "y"}), "its encoder"),
        ((grids(1, 2, 2), {"n_codes": 9}), (grids(1, 2, 2), {"n_codes": 10}), "its n_codes"),
    ],
)
def test_files_that_do_not_fit_one_another_are_refused(tmp_path, first, second, words):
    for name, (codes, about) in {"a": first, "b": second}.items():
        save_codes(tmp_path / f"{name}.safetensors", codes, **about)
    with pytest.raises(DataError, match=words):
        open_codes(tmp_path)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"x": torch.zeros(2, 2, 2, dtype=torch.int64)}, r"x must be integers \[h, w\]"),
        ({"codes": torch.zeros(2, 2, 2)}, "float32"),
        ({"codes": torch.zeros(2, 2, dtype=torch.int64)}, r"\[2, 2\]"),
        ({"codes": torch.zeros(0, 2, 2, dtype=torch.int64)}, r"\[0, 2, 2\]"),
        ({"codes": torch.full((2, 2, 2), -1)}, "-1"),
        ({"codes": torch.full((2, 2, 2), 16)}, r"16\.\.16, allowed 0\.\.15"),
        ({"codes": torch.zeros(2, 2, 2).long(), "labels": torch.zeros(3).long()}, r"labels.*\[2\]"),
        ({"codes": torch.zeros(2, 2, 2).long(), "labels": torch.zeros(2)}, "labels.*float32"),
        ({"codes": torch.zeros(2, 2, 2).long(), "condition": torch.zeros(2, 2, 3).long()}, "cond"),
        ({"labels": torch.zeros(3).long()}, "no codes"),
    ],
)
def test_a_file_that_does_not_fit_is_a_data_error(tmp_path, tensors, words):
    save_file(tensors, tmp_path / "c.safetensors")
    with pytest.raises(DataError, match=f"c.safetensors: .*{words}"):
        open_codes(tmp_path / "c.safetensors", 16)


@pytest.mark.parametrize("content", [None, b"", b"junk" * 100])
def test_a_file_that_is_none_is_a_data_error(tmp_path, content):
    if content is not None:
        (tmp_path / "c.safetensors").write_bytes(content)
    with pytest.raises(DataError, match="c.safetensors"):
        open_codes(tmp_path / "c.safetensors")


def test_a_label_without_a_name_is_a_data_error(tmp_path):
    path = tmp_path / "c.safetensors"
    save_codes(path, grids(2, 2, 2), torch.tensor([0, 1]), class_names=["cat"])
    with pytest.raises(DataError, match="label 1, but only 1 class_names"):
        open_codes(path)


def test_the_manifest_is_of_the_content(tmp_path):
    codes = grids(3, 2, 2)
    save_codes(tmp_path / "a.safetensors", codes)
    (tmp_path / "f").mkdir()
    for i in range(3):
        save_codes(tmp_path / "f" / f"{i}.safetensors", codes[i : i + 1])
    one = open_codes(tmp_path / "a.safetensors").manifest()
    assert one == open_codes(tmp_path / "f").manifest()
    for other, labels in ((codes.flip(0), None), (codes, torch.zeros(3).long())):
        save_codes(tmp_path / "b.safetensors", other, labels)
        assert open_codes(tmp_path / "b.safetensors").manifest() != one


def test_codes_are_told_from_pictures(tmp_path):
    save_codes(tmp_path / "codes" / "cat" / "c.safetensors", grids(1, 2, 2))
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "pictures" / "0.png")
    assert claims(tmp_path / "codes") and claims(tmp_path / "codes" / "cat" / "c.safetensors")
    assert not claims(tmp_path / "pictures")
    save_codes(tmp_path / "pictures" / "c.safetensors", grids(1, 2, 2))
    assert not claims(tmp_path / "pictures")
    with pytest.raises(DataError, match="codes, not pictures"):
        open_source(tmp_path / "codes")
    assert len(open_source(tmp_path / "pictures")) == 1


def test_the_digest_is_of_what_decides_the_codes():
    sizes = {
        "ch": 32,
        "ch_mult": (1,),
        "num_res_blocks": 1,
        "attn_resolutions": (),
        "z_channels": 4,
    }
    model = VQGAN(VQGANConfig(**sizes, resolution=8, n_embed=8, embed_dim=4, attn_type="none"))
    before = encoder_digest(model)
    with torch.no_grad():
        model.decoder.conv_in.weight.add_(1)
        model.post_quant_conv.weight.add_(1)
    assert encoder_digest(model) == before
    for weight in (model.quantize.embedding.weight, model.encoder.conv_in.weight):
        with torch.no_grad():
            weight[0].add_(1)
        assert encoder_digest(model) != before
        before = encoder_digest(model)
