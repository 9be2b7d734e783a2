"""On which kind of device an artifact is made: noted beside it where work begins, so that no two kinds mix in one.

`{artifact}/made-on/kind.json` says on which kind its shards were begun: the first worker to come creates it, and
workers on another kind are refused. `{artifact}/made-on/{hash}.json` holds the facts of every device that took part.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping

from infra.store.store import Store

FOLDER, KIND = "made-on", "kind.json"
DECISIVE = ("kind", "fp32", "cudnn_benchmark", "deterministic")
"""Facts that no two shards of an artifact may differ in; versions and names of devices are only told."""


def note(out: Store, facts: Mapping[str, str]) -> None:
    """Note a device that takes part in making the artifact in the folder `out`."""
    data = _json(facts)
    out.at(FOLDER).create(f"{hashlib.sha256(data).hexdigest()[:16]}.json", data)


def begin_shards(out: Store, facts: Mapping[str, str]) -> None:
    """Note a device that makes shards of the artifact in the folder `out`.

    Raises:
        ValueError: its shards were begun on another kind of device, or in another arithmetic.
    """
    claim_shards(out, facts)
    note(out, facts)


def claim_shards(out: Store, facts: Mapping[str, str]) -> None:
    """Keep the shards of the artifact in the folder `out` for a kind of device.

    Raises:
        ValueError: they were begun on another kind of device, or in another arithmetic.
    """
    folder, own = out.at(FOLDER), decisive(facts)
    if not folder.create(KIND, _json(own)) and (theirs := shards_begun_on(out)) not in (None, own):
        assert theirs is not None
        raise ValueError(
            f"{out.uri}: its shards were begun on {said(theirs)}, and this is {said(own)}: their numbers would mix; go "
            "on there, or begin anew here with --anew"
        )


def shards_begun_on(out: Store) -> dict[str, str] | None:
    """The kind of device and arithmetic of the shards that there are, None where none were begun."""
    try:
        return _read(out, KIND)
    except FileNotFoundError:
        return None


def made_on(out: Store) -> tuple[dict[str, str], ...]:
    """The facts of every device that took part, in no order that means anything."""
    return tuple(_read(out, name) for name in sorted(out.at(FOLDER).list()) if name != KIND)


def decisive(facts: Mapping[str, str]) -> dict[str, str]:
    """The facts that no two shards of an artifact may differ in."""
    return {name: facts[name] for name in DECISIVE if name in facts}


def said(facts: Mapping[str, str]) -> str:
    """Say facts in a line: "cuda sm90x132 (deterministic false, fp32 ieee)"."""
    rest = ", ".join(f"{name} {value}" for name, value in facts.items() if name != "kind")
    return f"{facts.get('kind', 'an unknown kind')} ({rest})" if rest else facts.get("kind", "an unknown kind")


def summary(devices: Iterable[Mapping[str, str]]) -> str:
    """Say all devices in a line, the kinds with their names and libraries; empty where none are known."""
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
        told = json.loads(out.at(FOLDER).read(name))
    except ValueError:
        told = None
    if not isinstance(told, dict):
        raise ValueError(f"{out.uri}/{FOLDER}/{name} is damaged; delete the folder {out.uri} and run again")
    return {str(key): str(value) for key, value in told.items()}
