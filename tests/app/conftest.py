"""Sources that adapters are fetched from: a hub and a bucket that tests may damage."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.app.fetch.servers import CONFIG, Hub, running_hub
from tests.app.transfers import FILES, tar_gz


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with running_hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        yield hub


@pytest.fixture(scope="module")
def s3() -> Iterator[Any]:
    import boto3  # noqa: PLC0415
    from moto.server import ThreadedMotoServer  # noqa: PLC0415

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    variables = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        client = boto3.client("s3")
        client.create_bucket(Bucket="lent")
        for name, content in FILES.items():
            client.put_object(Bucket="lent", Key=f"adapters/doctor/{name}", Body=content)
        client.put_object(Bucket="lent", Key="adapters/doctor/optimizer.pt", Body=b"x" * 10)
        client.put_object(Bucket="lent", Key="adapters/doctor/deep/golden.jsonl", Body=b"x")
        client.put_object(Bucket="lent", Key="adapters/pickled/adapter_config.json", Body=CONFIG)
        client.put_object(Bucket="lent", Key="adapters/pickled/adapter_model.bin", Body=b"x")
        client.put_object(Bucket="lent", Key="adapters/x.tar.gz", Body=tar_gz(FILES))
        yield client
        client.close()
    server.stop()
