"""Several base models from one file: defaults of an entry, and errors."""

from pathlib import Path

import pytest

from app.settings import Settings


def given(folder: Path, content: str, **changes: object) -> Settings:
    file = folder / "bases.yaml"
    file.write_text(content)
    return Settings.model_validate({"data_dir": folder, "base_models": file, **changes})


def test_an_entry_overrides_the_environment(tmp_path: Path) -> None:
    content = "- model: /models/one\n- model: org/two\n  served_model_name: second\n  max_loras: 2\n"
    one, two = given(tmp_path, content, max_loras=7, dtype="float32").bases()
    assert (one.model, one.served_model_name, one.max_loras, one.dtype) == (
        "/models/one",
        "one",
        7,
        "float32",
    )
    assert (two.model, two.served_model_name, two.max_loras, two.dtype) == ("org/two", "second", 2, "float32")


def test_without_a_file_the_environment_gives_one_base_model(tmp_path: Path) -> None:
    (one,) = Settings(data_dir=tmp_path, model="org/one", max_loras=3).bases()
    assert (one.model, one.served_model_name, one.max_loras) == ("org/one", "one", 3)
    (demo,) = Settings(data_dir=tmp_path).bases()
    assert demo.served_model_name == "xinglin-demo"


@pytest.mark.parametrize(("content", "changes", "told"), [
    ("model: one", {}, "must be a list of base models"),
    ("[]", {}, "must be a list of base models"),
    ("- one", {}, "must be a list of base models"),
    ("- model: [", {}, "is not YAML"),
    ("- dtype: float32", {}, "entry 1: model: this is required"),
    ("- model: one\n- model: two\n  max_lora: 2", {}, "entry 2: max_lora: no such setting; did you mean `max_loras`"),
    ("- model: one\n  color: red", {}, "entry 1: color: no such setting$"),
    ("- model: one\n  max_loras: 0", {}, "entry 1: max_loras: "),
    ("- model: one\n  max_resident: 2", {}, "entry 1: .*must be above max_loras"),
    ("- model: a/one\n- model: b/one", {}, "two base models are named one: give one of them another"),
    ("- model: one", {"model": "two"}, "leave out XINGLIN_MODEL and XINGLIN_SERVED_MODEL_NAME, or the file"),
    ("- model: one", {"served_model_name": "two"}, "leave out XINGLIN_MODEL"),
])  # fmt: skip
def test_wrong_files_are_rejected(tmp_path: Path, content: str, changes: dict[str, str], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        given(tmp_path, content, **changes).bases()


def test_a_missing_file_is_reported(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"missing\.yaml cannot be read: No such file"):
        Settings(data_dir=tmp_path, base_models=tmp_path / "missing.yaml").bases()
