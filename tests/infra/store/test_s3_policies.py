"""The policies of infra/deploy/s3 on a real server: each role can do its own work and nothing else.

SeaweedFS enforces all of them but the actions it has no name for (`UNKNOWN`), which are left out here.
"""

import json
from collections.abc import Iterator

import pytest
from botocore.session import Session

from infra.artifacts.manifest import ArtifactPlan, find, folder_of, publish
from infra.artifacts.shards import put
from infra.store.store import Store
from infra.training.checkpoint import CHECKPOINTS
from tests.conftest import FOREIGN
from tests.support import ROOT
from tests.support.s3_server import Instance, S3Server

pytestmark = pytest.mark.s3

POLICIES = ROOT / "infra" / "deploy" / "s3"
UNKNOWN = {"s3:ListBucketMultipartUploads", "s3:ListMultipartUploadParts"}
STORE = "s3://artifacts/sftok"
PLAN = ArtifactPlan(kind="images", version=1, config={"x": 1})


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """Start a server that enforces users and policies."""
    instance = Instance(tmp_path_factory.mktemp("s3"))
    instance.ports["s3.iam.readOnly"] = "false"
    try:
        assert instance.start(), (instance.home / "log").read_text(errors="replace")[-2000:]
        yield instance.server
    finally:
        instance.kill()


@pytest.fixture(scope="module")
def keys(server: S3Server) -> dict[str, tuple[str, str]]:
    """Make a user for each role, with only its policy."""
    iam = Session().create_client(
        "iam",
        endpoint_url=server.endpoint,
        region_name="us-east-1",
        aws_access_key_id=server.access_key,
        aws_secret_access_key=server.secret_key,
    )
    made = {}
    for role in ("reader", "writer", "collector"):
        policy = json.loads((POLICIES / f"{role}.json").read_text())
        for statement in policy["Statement"]:
            statement["Action"] = [one for one in statement["Action"] if one not in UNKNOWN]
        policy["Statement"] = [one for one in policy["Statement"] if one["Action"]]
        iam.create_user(UserName=role)
        key = iam.create_access_key(UserName=role)["AccessKey"]
        iam.put_user_policy(UserName=role, PolicyName=role, PolicyDocument=json.dumps(policy))
        made[role] = (key["AccessKeyId"], key["SecretAccessKey"])
    return {**made, "root": (server.access_key, server.secret_key)}


@pytest.fixture
def act_as(server: S3Server, keys: dict[str, tuple[str, str]], monkeypatch: pytest.MonkeyPatch):
    """Open the store as a role."""
    for name in FOREIGN:
        monkeypatch.delenv(name, raising=False)

    def act(role: str, root: str = STORE) -> Store:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", keys[role][0])
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", keys[role][1])
        return Store(root)

    return act


def make(store: Store) -> None:
    """Publish an artifact, with a checkpoint along the way."""
    out = folder_of(store, PLAN.kind, PLAN.digest)
    out.write(f"{CHECKPOINTS}/1/checkpoint.json", b"{}")
    file = put(out, "train-00000.parquet", b"rows")
    publish(store, PLAN, files=[file], counts={}, metrics={}, seconds=0.0)
    out.at(CHECKPOINTS).delete_tree()
    store.write("runs/first/run.json", b"{}")


def test_the_writer_makes_artifacts_and_cannot_take_them_away(act_as) -> None:
    store = act_as("writer")
    store.check()
    make(store)
    assert find(store, PLAN) is not None
    assert store.at("artifacts").folders() == ["images"]
    assert not store.at("artifacts", "images", PLAN.digest, CHECKPOINTS).list()
    with pytest.raises(ValueError, match="refused the credentials"):
        store.delete(f"artifacts/images/{PLAN.digest}/manifest.json")
    with pytest.raises(ValueError, match="refused the credentials"):
        act_as("writer", "s3://tests/elsewhere").write("x", b"y")


def test_the_reader_reads(act_as) -> None:
    make(act_as("root"))
    store = act_as("reader")
    assert find(store, PLAN) is not None
    assert store.read("runs/first/run.json") == b"{}"
    for change in (lambda: store.write("runs/first/run.json", b"[]"), lambda: store.delete("runs/first/run.json")):
        with pytest.raises(ValueError, match="refused the credentials"):
            change()
    assert act_as("root").read("runs/first/run.json") == b"{}"


def test_the_collector_takes_away_and_makes_nothing(act_as) -> None:
    make(act_as("root"))
    store = act_as("collector")
    store.check()
    store.at("artifacts", "images", PLAN.digest).delete_tree()
    assert find(store, PLAN) is None
    with pytest.raises(ValueError, match="refused the credentials"):
        store.write("runs/first/run.json", b"[]")
