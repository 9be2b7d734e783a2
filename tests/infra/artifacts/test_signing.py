"""Manifests that were changed, or written without the key, are rejected before they are used."""

import json

import pytest

from infra.artifacts import signing
from infra.artifacts.manifest import ArtifactPlan, Manifest, find, folder_of, manifest_of, publish, ref_of
from infra.artifacts.shards import put
from infra.artifacts.verify import read_manifest
from infra.store.store import Store

PLAN = ArtifactPlan(kind="images", version=1, config={})
KEY = "a-key-of-more-than-16-characters"


def published(store: Store) -> Manifest:
    entry = put(folder_of(store, PLAN.kind, PLAN.digest), "data.bin", b"data")
    return publish(store, PLAN, files=[entry], counts={}, metrics={"psnr": float("inf")}, seconds=1)


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(signing.KEY, KEY)


def test_without_a_key_manifests_are_as_they_always_were(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(signing.KEY, raising=False)
    made = published(store)
    assert "signature" not in json.loads(store.read(f"{PLAN.prefix}/manifest.json"))
    assert manifest_of(store, ref_of(store, made)) == made


@pytest.mark.usefixtures("key")
class TestSigned:
    def test_what_was_signed_is_read_and_the_key_is_nowhere(self, store: Store) -> None:
        made = published(store)
        assert made.signature is not None
        assert manifest_of(store, ref_of(store, made)) == made
        assert published(store) == made
        assert not [name for name in store.list() if KEY.encode() in store.read(name)]

    @pytest.mark.parametrize(
        ("field", "value"),
        [("counts", {"images": 7}), ("command", "evil"), ("created_at", "2020"), ("metrics", {"psnr": 99.0})],
    )
    def test_a_change_is_noticed(self, store: Store, field: str, value: object) -> None:
        published(store)
        key = f"{PLAN.prefix}/manifest.json"
        store.write(key, json.dumps({**json.loads(store.read(key)), field: value}).encode())
        with pytest.raises(ValueError, match=r"manifest\.json: its signature does not match SFTOK_SIGNING_KEY"):
            find(store, PLAN)
        findings = read_manifest(store, PLAN.kind, PLAN.digest)[1]
        assert any("its signature does not match" in finding.problem for finding in findings)

    def test_another_file_under_the_same_name_needs_another_manifest(self, store: Store) -> None:
        made = published(store)
        changed = made.files[0].model_copy(update={"sha256": "0" * 64})
        forged = made.model_copy(update={"files": (changed,)})
        store.write(f"{PLAN.prefix}/manifest.json", forged.model_dump_json().encode())
        with pytest.raises(ValueError, match="its signature does not match"):
            find(store, PLAN)

    def test_without_a_signature_it_is_refused(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv(signing.KEY)
        published(store)
        monkeypatch.setenv(signing.KEY, KEY)
        with pytest.raises(ValueError, match="is not signed, and SFTOK_SIGNING_KEY is set"):
            find(store, PLAN)
        monkeypatch.setenv(signing.KEY, "another-key-of-16-characters")
        store.at("artifacts").delete_tree()
        published(store)
        monkeypatch.setenv(signing.KEY, KEY)
        with pytest.raises(ValueError, match="or signed with another key"):
            find(store, PLAN)

    def test_a_key_that_can_be_guessed_is_refused(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(signing.KEY, "secret")
        with pytest.raises(ValueError, match=r"SFTOK_SIGNING_KEY has 6 characters: give it at least 16") as caught:
            published(store)
        assert "secret" not in str(caught.value)
