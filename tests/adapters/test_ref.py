"""adapters/ref.py: valid names of adapters, aliases and revisions."""

import pytest

from adapters import AdapterRef, InvalidRef
from adapters.ref import check_alias, check_name, check_revision, folder_name, name_of

REVISION = "3f2a9c1b77de"


@pytest.mark.parametrize(
    ("text", "ref"),
    [
        ("doctor", AdapterRef("doctor", alias="default")),
        ("doctor@default", AdapterRef("doctor", alias="default")),
        ("doctor@canary", AdapterRef("doctor", alias="canary")),
        (f"doctor@{REVISION}", AdapterRef("doctor", revision=REVISION)),
        ("doctor@3f2a9c1b77d", AdapterRef("doctor", alias="3f2a9c1b77d")),  # 11 digits are an alias
        (f"{REVISION}@v1.2", AdapterRef(REVISION, alias="v1.2")),
        ("a", AdapterRef("a", alias="default")),
        ("a" * 96, AdapterRef("a" * 96, alias="default")),
        ("SQL_LoRA", AdapterRef("SQL_LoRA", alias="default")),
        ("org/My_Adapter.v1@canary", AdapterRef("org/My_Adapter.v1", alias="canary")),
        ("qwen3-8b_med.v2@x", AdapterRef("qwen3-8b_med.v2", alias="x")),
    ],
)
def test_parse_reads_what_str_prints(text: str, ref: AdapterRef) -> None:
    assert AdapterRef.parse(text) == ref
    assert AdapterRef.parse(str(ref)) == ref


BAD = [
    "", ".", "..", "a/b/c", "a//b", "a/", "/a", "a/..", "a/../b", "a/.b", "a./b",
    "a\\b", "/etc", "../x", "a%2Fb", "%2e%2e", "a" * 97, "a" * 10_000, "é",
    "杏林", "👩‍⚕️", "dоctor", "-a", "a-", ".a", "a.", "_a", " a", "a ", "a b", "a..b", "a\n", "a\0", "a:b", "a*", "ａ",
    "٣", "\u202ea",
]  # fmt: skip


@pytest.mark.parametrize("bad", BAD, ids=ascii)
@pytest.mark.parametrize("check", [check_name, check_alias, check_revision, AdapterRef.parse])
def test_invalid_names_are_refused_everywhere(check, bad: str) -> None:
    with pytest.raises(InvalidRef) as caught:
        check(bad)
    assert len(str(caught.value)) < 400
    assert str(caught.value).isascii()


@pytest.mark.parametrize("bad", [*BAD, "a@b", "a/b", "Canary", "a" * 65], ids=ascii)
def test_invalid_aliases_in_a_ref_are_refused(bad: str) -> None:
    with pytest.raises(InvalidRef):
        AdapterRef.parse(f"doctor@{bad}")


def test_an_alias_cannot_look_like_a_revision() -> None:
    with pytest.raises(InvalidRef, match="12 hexadecimal digits"):
        check_alias(REVISION)


@pytest.mark.parametrize("bad", [REVISION.upper(), REVISION[:-1], REVISION + "0", "g" * 12, "default"])
def test_a_revision_is_12_hexadecimal_digits(bad: str) -> None:
    with pytest.raises(InvalidRef, match="not a revision"):
        check_revision(bad)


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("qwen3-8b_med.v2", "qwen3-8b_med.v2"),
        ("SQL_LoRA", "+s+q+l_+lo+r+a"),
        ("org/My_Adapter.v1", "org+.+my_+adapter.v1"),
        ("A/B", "+a+.+b"),
    ],
)
def test_every_name_has_its_own_lower_case_folder(name: str, folder: str) -> None:
    assert folder_name(name) == folder == folder.lower()
    assert name_of(folder) == name


@pytest.mark.parametrize(
    "folder", ["Doctor", "a/b", "a+", "++a", "a++.b", "+.a", "+1", "lost+found/", "No Adapter", ".staging"]
)
def test_other_folders_are_refused(folder: str) -> None:
    with pytest.raises(InvalidRef):
        name_of(folder)
