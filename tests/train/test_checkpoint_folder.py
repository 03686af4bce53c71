import os

from moe_jax.train import checkpoint_folder, manifest


def saved(folder, step, text="x", keep=2):
  checkpoint_folder.begin(folder, step)
  (checkpoint_folder.staging(folder, step) / "data").write_text(text)
  checkpoint_folder.finish(folder, step, keep=keep)


def names(folder):
  return sorted(path.name for path in folder.iterdir())


def steps(found):
  return [step for step, _ in found]


def test_the_newest_stay(tmp_path):
  for step in (0, 5, 10, 100):
    saved(tmp_path, step)
  assert names(tmp_path) == ["10", "100"]
  assert steps(checkpoint_folder.complete(tmp_path)) == [100, 10]


def test_nothing_newer_than_the_saved_step_is_deleted(tmp_path):
  for step in (40, 50, 10, 20, 30):
    saved(tmp_path, step)
  assert steps(checkpoint_folder.complete(tmp_path)) == [50, 40, 30, 20]


def test_an_interrupted_save_stays_until_a_newer_one_is_complete(tmp_path):
  saved(tmp_path, 10)
  checkpoint_folder.begin(tmp_path, 20)
  assert steps(checkpoint_folder.complete(tmp_path)) == [10]
  assert steps(checkpoint_folder.incomplete(tmp_path)) == [20]
  checkpoint_folder.begin(tmp_path, 30)
  assert names(tmp_path) == ["10", "20.saving", "30.saving"]
  checkpoint_folder.finish(tmp_path, 30, keep=2)
  assert names(tmp_path) == ["10", "30"]


def test_saving_a_step_again_replaces_it(tmp_path):
  saved(tmp_path, 10, "old")
  saved(tmp_path, 10, "new")
  assert names(tmp_path) == ["10"]
  assert (tmp_path / "10" / "data").read_text() == "new"


def test_replacing_is_safe_at_every_interruption(tmp_path):
  saved(tmp_path, 10, "old")
  checkpoint_folder.begin(tmp_path, 10)
  staging = checkpoint_folder.staging(tmp_path, 10)
  (staging / "data").write_text("new")
  assert checkpoint_folder.complete(tmp_path) == [(10, tmp_path / "10")]
  manifest.write(staging)
  assert checkpoint_folder.complete(tmp_path) == [(10, staging), (10, tmp_path / "10")]
  (tmp_path / "10").rename(tmp_path / "10.replaced")
  assert checkpoint_folder.complete(tmp_path) == [(10, staging)]
  saved(tmp_path, 10, "newest")
  assert names(tmp_path) == ["10"]
  assert (tmp_path / "10" / "data").read_text() == "newest"


def test_an_interrupted_deletion_is_no_checkpoint_and_is_finished_later(tmp_path):
  saved(tmp_path, 10)
  (tmp_path / "10").rename(tmp_path / "10.deleting")
  assert checkpoint_folder.complete(tmp_path) == []
  saved(tmp_path, 20)
  assert names(tmp_path) == ["20"]


def test_what_cannot_be_deleted_stays_no_checkpoint_until_a_later_save_deletes_it(
  tmp_path, monkeypatch
):
  def refuse(path, **_):
    raise PermissionError(f"{path} may not be deleted")

  for step in (10, 20):
    saved(tmp_path, step)
  with monkeypatch.context() as patch:
    patch.setattr(os, "unlink", refuse)
    for step in (30, 40):
      saved(tmp_path, step)
  assert names(tmp_path) == ["10.deleting", "20.deleting", "30", "40"]
  assert steps(checkpoint_folder.complete(tmp_path)) == [40, 30]
  saved(tmp_path, 50)
  assert names(tmp_path) == ["40", "50"]


def test_put_aside_keeps_every_damaged_one(tmp_path):
  for text in ("first", "second", "third"):
    saved(tmp_path, 10, text)
    checkpoint_folder.put_aside(tmp_path / "10")
  saved(tmp_path, 20)
  assert names(tmp_path) == ["10.damaged", "10.damaged-2", "10.damaged-3", "20"]
  assert (tmp_path / "10.damaged-2" / "data").read_text() == "second"


def test_what_is_not_a_checkpoint_is_left_alone(tmp_path):
  others = ["010", "1e3", "notes", "7.bak", "-3", "x.deleting"]
  for name in others:
    (tmp_path / name).mkdir()
  (tmp_path / "5").write_text("a file")
  saved(tmp_path, 10, keep=1)
  assert steps(checkpoint_folder.complete(tmp_path)) == [10]
  assert names(tmp_path) == sorted([*others, "5", "10"])


def test_a_folder_that_does_not_exist_holds_nothing(tmp_path):
  assert checkpoint_folder.complete(tmp_path / "none") == []
  assert checkpoint_folder.incomplete(tmp_path / "none") == []
