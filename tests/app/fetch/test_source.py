import pytest

from app.errors import BadRequest, PathNotAllowed
from app.fetch import checked_prefixes, parse_source

ALLOWED = (
    "hf://my-org/",
    "hf://other/repo",
    "hf://pinned/repo@v1",
    "s3://my-bucket/adapters/",
    "https://models.example.org/lora/",
    "https://[2606:4700::1]:8443/",
    "https://93.184.216.34/",
)
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("hf://my-org/repo", "hf://my-org/repo"),
        ("HF://my-org/repo", "hf://my-org/repo"),
        ("hf://my-org/repo/", "hf://my-org/repo"),
        ("hf://my-org/repo@main", "hf://my-org/repo@main"),
        (f"hf://my-org/repo@{COMMIT}/sub/folder", f"hf://my-org/repo@{COMMIT}/sub/folder"),
        ("hf://my-org/repo@refs/pr/3/sub", "hf://my-org/repo@refs/pr/3/sub"),
        ("hf://my-org/repo/sub", "hf://my-org/repo/sub"),
        ("hf://other/repo@v2", "hf://other/repo@v2"),
        ("hf://pinned/repo@v1/sub", "hf://pinned/repo@v1/sub"),
        ("s3://my-bucket/adapters/doctor", "s3://my-bucket/adapters/doctor/"),
        ("s3://my-bucket/adapters/doctor/", "s3://my-bucket/adapters/doctor/"),
        ("s3://my-bucket/adapters/x.tar.gz", "s3://my-bucket/adapters/x.tar.gz"),
        ("https://models.example.org/lora/x.tgz", "https://models.example.org/lora/x.tgz"),
        ("HTTPS://Models.Example.ORG/lora/x.ZIP", "https://models.example.org/lora/x.ZIP"),
        ("https://models.example.org:443/lora/x.zip", "https://models.example.org/lora/x.zip"),
        ("https://models.example.org/lora/a%20b.zip", "https://models.example.org/lora/a%20b.zip"),
        ("https://[2606:4700:0:0::1]:8443/x.zip", "https://[2606:4700::1]:8443/x.zip"),
        ("https://93.184.216.34/x.zip", "https://93.184.216.34/x.zip"),
    ],
)
def test_a_source_has_one_canonical_form(text: str, url: str) -> None:
    assert parse_source(text, ALLOWED).url == url


@pytest.mark.parametrize(
    "text",
    [
        "https://models.example.org.evil.com/lora/x.zip",
        "https://evil-models.example.org/lora/x.zip",
        "https://models.example.org:444/lora/x.zip",
        "http://models.example.org/lora/x.zip",
        "https://models.example.org/x.zip",
        "https://models.example.org/lora2/x.zip",
        "https://models.example.org/LORA/x.zip",
        "https://93.184.216.35/x.zip",
        "https://localhost/x.zip",
        "https://127.0.0.1/x.zip",
        "https://[::1]/x.zip",
        "https://[::ffff:127.0.0.1]/x.zip",
        "https://xn--mdels-vxa.example.org/lora/x.zip",
        "s3://my-bucket-evil/adapters/x/",
        "s3://my-bucket/adapters-evil/x/",
        "s3://my-bucket/",
        "gs://my-bucket/adapters/x/",
        "hf://my-org-evil/repo",
        "hf://My-Org/repo",
        "hf://other/repo2",
        "hf://pinned/repo",
        "hf://pinned/repo@v2",
        "hf://pinned/repo@v10",
    ],
)
def test_sources_outside_all_prefixes_are_refused(text: str) -> None:
    with pytest.raises(PathNotAllowed, match="add it to XINGLIN_SOURCES"):
        parse_source(text, ALLOWED)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "doctor",
        "/etc/passwd",
        "file:///etc/passwd",
        "ftp://models.example.org/lora/x.zip",
        "simplecache::https://models.example.org/lora/x.zip",
        "https:/models.example.org/lora/x.zip",
        "https://models.example.org@evil.com/lora/x.zip",
        "https://user:secret@models.example.org/lora/x.zip",
        "https://models.example.org/lora/x.zip?X-Amz-Signature=secret",
        "https://models.example.org/lora/x.zip#part",
        "https://models.example.org\\@evil.com/lora/x.zip",
        "https://evil.com\\.models.example.org/lora/x.zip",
        "https://models.example.org/lora/../secret/x.zip",
        "https://models.example.org/lora/%2e%2e/secret/x.zip",
        "https://models.example.org/lora/%2E./secret/x.zip",
        "https://models.example.org/lora/..%2fsecret/x.zip",
        "https://models.example.org/lora/..%5csecret/x.zip",
        "https://models.example.org/lora/%252e%252e/x.zip",
        "https://models.example.org/lora//x.zip",
        "https://models.example.org/lora/./x.zip",
        "https://models.example.org/lora/%00x.zip",
        "https://models.example.org/lora/%zz.zip",
        "https://models.example.org/lora/x y.zip",
        "https://models.example.org./lora/x.zip",
        "https://models.example.org:/lora/x.zip",
        "https://models.example.org:0/lora/x.zip",
        "https://models.example.org:99999/lora/x.zip",
        "https://models.example.org%2eevil.com/lora/x.zip",
        "https://models。example.org/lora/x.zip",
        "https://modéls.example.org/lora/x.zip",
        "https://models.example.org\t.evil.com/lora/x.zip",
        "https://models.example.org\n/lora/x.zip",
        " https://models.example.org/lora/x.zip",
        "https:///lora/x.zip",
        "https://models.example.org/lora/x.html",
        "https://models.example.org/lora/",
        "https://2130706433/x.zip",
        "https://0x7f.1/x.zip",
        "https://0x7f000001/x.zip",
        "https://0177.0.0.1/x.zip",
        "https://127.1/x.zip",
        "https://[fe80::1%25eth0]/x.zip",
        "https://[::1/x.zip",
        "s3://key:secret@my-bucket/adapters/x/",
        "s3://my-bucket/adapters/../x/",
        "s3://my-bucket/adapters/%2e%2e/x/",
        "s3://my-bucket/adapters/*/",
        "s3://my-bucket/adapters/x.zip?versionId=1",
        "s3:///adapters/x/",
        "s3://My-Bucket/adapters/x/",
        "hf://my-org",
        "hf://my-org/",
        "hf://my-org/..",
        "hf://my-org/repo@",
        "hf://my-org/repo@a/../b",
        "hf://my-org/repo@..",
        "hf://my-org/repo@main@evil",
        "hf://my-org/repo/../../evil/repo",
        "hf://my-org/repo@main/%2e%2e",
        "hf://token@my-org/repo",
        "https://models.example.org/lora/" + "x" * 3000 + ".zip",
    ],
)
def test_invalid_sources_are_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(BadRequest) as caught:
        parse_source(text, ALLOWED)
    assert (caught.value.code, caught.value.param) == ("invalid_source", "source")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("prefix", ["hf://", "hf://my-org", "hf://my-org/", "hf://my-org/repo"])
def test_prefixes_match_whole_names(prefix: str) -> None:
    assert parse_source("hf://my-org/repo@main", [prefix]).revision == "main"


@pytest.mark.parametrize(
    "prefix", ["*", "my-org", "ftp://host/", "https://user@host/", "s3://My/", "https://host/?x"]
)
def test_an_invalid_prefix_is_rejected_at_the_start(prefix: str) -> None:
    with pytest.raises(ValueError, match="XINGLIN_SOURCES"):
        checked_prefixes([prefix])


def test_nothing_is_allowed_by_default() -> None:
    with pytest.raises(PathNotAllowed):
        parse_source("hf://my-org/repo", [])
