"""Artifacts record the devices that made them, and no two kinds mix in one artifact."""

from types import SimpleNamespace

import pytest

from infra.artifacts.made_on import begin_shards, decisive, made_on, record_device, shards_begun_on, summary
from infra.artifacts.manifest import ArtifactPlan, folder_of, publish
from infra.compute.device import IEEE, NumericsConfig, cpu_features, device_facts, device_kind, use_numerics
from infra.store.store import Store

CPU = {"kind": "cpu avx2", "torch": "2.14.1"}
H200 = {"kind": "cuda sm90", "torch": "2.14.1", "device": "NVIDIA H200", "cuda": "13.0", "cudnn": "91900"}
H200 |= {"fp32": "ieee", "cudnn_benchmark": "false", "deterministic": "false"}


@pytest.fixture
def out(tmp_path) -> Store:
    return Store(tmp_path / "artifact")


def test_the_first_kind_keeps_the_shards_and_another_is_refused_with_the_remedy(out: Store) -> None:
    begin_shards(out, H200)
    begin_shards(out, H200)
    assert shards_begun_on(out) == decisive(H200)
    with pytest.raises(ValueError, match=r"begun on cuda sm90 \(.*\), and this is cpu avx2: .* --anew") as refused:
        begin_shards(out, CPU)
    assert str(out.uri) in str(refused.value)
    assert "\n" not in str(refused.value)
    assert made_on(out) == (H200,)


@pytest.mark.parametrize(
    "change", [{"kind": "cuda sm80"}, {"fp32": "tf32"}, {"deterministic": "true"}, {"cudnn_benchmark": "true"}]
)
def test_another_generation_or_arithmetic_is_another_kind(out: Store, change: dict[str, str]) -> None:
    begin_shards(out, H200)
    with pytest.raises(ValueError, match="their numbers would mix"):
        begin_shards(out, H200 | change)


def test_names_and_versions_are_told_and_do_not_divide(out: Store) -> None:
    """Guards against a re-tokenization that stops at every library update."""
    other = H200 | {"device": "NVIDIA H100", "torch": "2.15.0"}
    begin_shards(out, H200)
    begin_shards(out, other)
    assert sorted(facts["device"] for facts in made_on(out)) == ["NVIDIA H100", "NVIDIA H200"]
    assert summary(made_on(out)).count("cuda sm90") == 2


def test_a_training_may_change_its_device_and_the_manifest_says_so(tmp_path) -> None:
    store, plan = Store(tmp_path), ArtifactPlan(kind="tokenizer", version=1, config={})
    folder = folder_of(store, plan.kind, plan.digest)
    record_device(folder, CPU)
    record_device(folder, H200)
    record_device(folder, CPU)
    manifest = publish(store, plan, files=[], counts={}, metrics={}, seconds=0.0)
    assert sorted(facts["kind"] for facts in manifest.made_on) == ["cpu avx2", "cuda sm90"]
    assert "made_on" not in publish(
        store, ArtifactPlan(kind="images", version=1, config={}), files=[], counts={}, metrics={}, seconds=0.0
    ).model_dump(mode="json")


def test_the_facts_of_this_cpu() -> None:
    facts = device_facts("cpu", IEEE)
    assert facts["kind"] == device_kind("cpu") == f"cpu {cpu_features()}"
    assert facts.keys() == {"kind", "torch"}  # a CPU has one arithmetic


def test_kinds_of_cpu_follow_what_kernels_are_chosen_by(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def features(found: str, limit: str | None, **probes: bool) -> str:
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: found)
        for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
            monkeypatch.setattr(torch.cpu, name, lambda name=name: probes.get(name, False), raising=False)
        if limit is None:
            monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
        else:
            monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
        return cpu_features()

    assert features("AVX2", None) == features("AVX2", "AVX2") == "avx2"
    assert features("AVX512", None) == "avx512"
    assert features("AVX512", None, _is_avx512_bf16_supported=True) == "avx512+bf16"
    assert features("AVX512", None, _is_avx512_bf16_supported=True, _is_amx_tile_supported=True) == "avx512+amx"
    assert features("AVX512", "AVX2", _is_avx512_bf16_supported=True) == "avx512, oneDNN avx2"


@pytest.mark.parametrize("data", [b"", b"[]", b'"cpu"', b"\xff\xfe"])
def test_a_damaged_note_is_named_with_the_remedy(out: Store, data: bytes) -> None:
    out.write("made-on/kind.json", data)
    with pytest.raises(ValueError, match=r"/made-on/kind\.json is damaged; delete the folder .* and run again$"):
        begin_shards(out, CPU)


def test_gpus_of_one_generation_and_another_size_are_of_two_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    """An A30 has half an A100's multiprocessors, so cuBLAS chooses other kernels, which sum in another order."""
    import torch

    def kind(multiprocessors: int) -> str:
        properties = SimpleNamespace(major=8, minor=0, multi_processor_count=multiprocessors)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
        return device_kind("cuda")

    assert (kind(108), kind(56)) == ("cuda sm80x108", "cuda sm80x56")


def test_a_cpu_has_no_switches_to_set() -> None:
    import torch

    before = torch.backends.cuda.matmul.allow_tf32, torch.are_deterministic_algorithms_enabled()
    use_numerics(NumericsConfig(fp32="tf32", deterministic=True), "cpu")
    assert before == (torch.backends.cuda.matmul.allow_tf32, torch.are_deterministic_algorithms_enabled())


@pytest.mark.gpu
def test_the_switches_on_cuda() -> None:
    import torch

    try:
        use_numerics(NumericsConfig(fp32="tf32", cudnn_benchmark=True), "cuda")
        assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == (True, True)
        assert torch.backends.cudnn.benchmark
        use_numerics(NumericsConfig(deterministic=True, cudnn_benchmark=True), "cuda")
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.backends.cudnn.benchmark
        assert not torch.backends.cuda.flash_sdp_enabled()  # its gradients are added up in any order
    finally:
        use_numerics(IEEE, "cuda")
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == (False, False)
    assert not torch.are_deterministic_algorithms_enabled()
    facts = device_facts("cuda", IEEE)
    assert facts["kind"].startswith("cuda sm")
    assert facts["fp32"] == "ieee"
