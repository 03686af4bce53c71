import json

import pytest

from moe_jax.train import manifest


@pytest.fixture
def folder(tmp_path):
  (tmp_path / "a" / "b").mkdir(parents=True)
  (tmp_path / "a" / "b" / "data").write_bytes(bytes(range(256)) * 40)
  (tmp_path / "empty").touch()
  (tmp_path / "name with spaces é").write_text("text")
  manifest.write(tmp_path)
  return tmp_path


def test_an_untouched_folder_is_intact(folder):
  assert manifest.damage(folder) is None
  assert not (folder / "manifest.json.tmp").exists()
  listed = json.loads((folder / manifest.NAME).read_text())["files"]
  assert sorted(listed) == ["a/b/data", "empty", "name with spaces é"]


@pytest.mark.parametrize("bit", range(0, 8 * 10_240, 8 * 1_000 + 3))
def test_a_flipped_bit_is_found(folder, bit):
  path = folder / "a" / "b" / "data"
  content = bytearray(path.read_bytes())
  content[bit // 8] ^= 1 << bit % 8
  path.write_bytes(content)
  assert manifest.damage(folder) == "a/b/data has other contents than were saved"


def test_a_flipped_bit_anywhere_in_the_manifest_is_found_there(folder):
  path = folder / manifest.NAME
  original = path.read_bytes()
  for i in range(len(original)):
    path.write_bytes(original[:i] + bytes([original[i] ^ 1 << i % 8]) + original[i + 1 :])
    assert manifest.damage(folder) == "manifest.json is not as it was written", i
  path.write_bytes(original)
  assert manifest.damage(folder) is None


@pytest.mark.parametrize(
  "text", ["", "[]", "7", "{}", '{"files": 3}', '{"sha256": "", "files": {}}', "{" * 100]
)
def test_a_manifest_of_another_form_is_damage(folder, text):
  (folder / manifest.NAME).write_text(text)
  assert manifest.damage(folder) == "manifest.json is not as it was written"


def test_missing_and_resized_files_are_named(folder):
  data = folder / "a" / "b" / "data"
  data.write_bytes(data.read_bytes()[:-1])
  assert manifest.damage(folder) == "a/b/data has 10239 bytes, expected 10240"
  data.unlink()
  assert manifest.damage(folder) == "a/b/data is missing"
  (folder / manifest.NAME).unlink()
  assert manifest.damage(folder) == "manifest.json is missing"


def test_a_folder_in_place_of_a_file_is_damage(folder):
  (folder / "empty").unlink()
  (folder / "empty").mkdir()
  assert "empty" in manifest.damage(folder)
