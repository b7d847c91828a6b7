"""service.beside: what is derived from a gallery belongs to its model, and goes with it."""

from pathlib import Path

from service.beside import DIRECTORY, Beside
from service.gallery.logged import LoggedGallery
from service.settings import Settings
from trainer.representation.bundle import Bundle


def test_beside__keeps_one_directory_for_each_model(tmp_path: Path, bundle: Bundle) -> None:
    settings = Settings.model_validate({"bundle": bundle.directory, "state": tmp_path})
    other = tmp_path / DIRECTORY / "another model" / "graph"
    other.mkdir(parents=True)
    told: list[tuple[int, float]] = []
    gallery = LoggedGallery(tmp_path, bundle)
    beside = Beside(gallery, settings, on_progress=lambda *facts: told.append(facts))
    assert beside.graph.wait_for(gallery.snapshot(), 50, timeout_s=20) is not None
    beside.forget_others()
    beside.close()
    gallery.close()
    assert [p.name for p in (tmp_path / DIRECTORY).iterdir()] == [bundle.model_id[:16]]
    assert (beside.directory / "graph" / "manifest.json").is_file()
    assert told[-1] == (40, 1.0)
