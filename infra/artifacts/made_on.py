"""Record the kind of device that makes an artifact, so that shards of two kinds never mix in one artifact.

`{artifact}/made-on/kind.json` names the kind of device on which its shards were begun: the first worker creates it, and
workers on another kind are rejected. `{artifact}/made-on/{hash}.json` holds the facts of every device that took part.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping

from infra.store.store import Store

FOLDER, KIND = "made-on", "kind.json"
DECISIVE = ("kind", "fp32", "cudnn_benchmark", "deterministic")
"""Facts that all shards of an artifact must share; versions and device names are recorded for information only."""


def record_device(out: Store, facts: Mapping[str, str]) -> None:
    """Record a device that takes part in making the artifact in the folder `out`."""
    data = _json(facts)
    out.at(FOLDER).create(f"{hashlib.sha256(data).hexdigest()[:16]}.json", data)


def begin_shards(out: Store, facts: Mapping[str, str]) -> None:
    """Claim the shards of the artifact in the folder `out` for a device's kind, and record the device.

    Raises:
        ValueError: the shards were begun on another kind of device, or with other numerics.
    """
    claim_shards(out, facts)
    record_device(out, facts)


def claim_shards(out: Store, facts: Mapping[str, str]) -> None:
    """Reserve the shards of the artifact in the folder `out` for one kind of device.

    Raises:
        ValueError: the shards were begun on another kind of device, or with other numerics.
    """
    folder, own = out.at(FOLDER), decisive(facts)
    if not folder.create(KIND, _json(own)) and (theirs := shards_begun_on(out)) not in (None, own):
        assert theirs is not None
        raise ValueError(
            f"{out.uri}: its shards were begun on {describe_kind(theirs)}, and this is {describe_kind(own)}: "
            "their numbers would mix; resume there, or start over here with --anew"
        )


def shards_begun_on(out: Store) -> dict[str, str] | None:
    """Return the kind of device and the numerics of the existing shards; None if no shard was begun."""
    try:
        return _read(out, KIND)
    except FileNotFoundError:
        return None


def made_on(out: Store) -> tuple[dict[str, str], ...]:
    """Return the facts of every device that took part, in arbitrary order."""
    return tuple(_read(out, name) for name in sorted(out.at(FOLDER).list()) if name != KIND)


def decisive(facts: Mapping[str, str]) -> dict[str, str]:
    """Select the facts that all shards of an artifact must share."""
    return {name: facts[name] for name in DECISIVE if name in facts}


def describe_kind(facts: Mapping[str, str]) -> str:
    """Format facts in one line: "cuda sm90x132 (deterministic false, fp32 ieee)"."""
    rest = ", ".join(f"{name} {value}" for name, value in facts.items() if name != "kind")
    return f"{facts.get('kind', 'an unknown kind')} ({rest})" if rest else facts.get("kind", "an unknown kind")


def summary(devices: Iterable[Mapping[str, str]]) -> str:
    """Format all devices in one line, each kind with its names and libraries; empty if none are known."""
    return "; ".join(sorted({_summary(facts) for facts in devices}))


def _summary(facts: Mapping[str, str]) -> str:
    kind = facts.get("kind", "an unknown kind")
    if "device" not in facts:
        return f"{kind}, torch {facts.get('torch', '?')}"
    numerics = [f"fp32 {facts.get('fp32', '?')}"]
    numerics += [name for name in ("cudnn_benchmark", "deterministic") if facts.get(name) == "true"]
    libraries = f"torch {facts.get('torch', '?')}, CUDA {facts.get('cuda', '?')}, cuDNN {facts.get('cudnn', '?')}"
    return f"{kind} ({facts['device']}), {libraries}, {', '.join(numerics)}"


def _json(facts: Mapping[str, str]) -> bytes:
    return json.dumps(dict(facts), sort_keys=True, indent=1).encode()


def _read(out: Store, name: str) -> dict[str, str]:
    try:
        facts = json.loads(out.at(FOLDER).read(name))
    except ValueError:
        facts = None
    if not isinstance(facts, dict):
        raise ValueError(f"{out.uri}/{FOLDER}/{name} is damaged; delete the folder {out.uri} and run again")
    return {str(key): str(value) for key, value in facts.items()}
