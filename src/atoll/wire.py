"""One update as bytes: a body that is a safetensors file, and a small signed envelope beside it.

Body (version 1), readable by anything that reads safetensors::

    8 bytes   length n of the header, little-endian
    n bytes   JSON: "group/tensor": {dtype, shape, data_offsets}, "__metadata__": {atoll, model, weight, metrics}
    the rest  the groups' flat vectors, one after the other

Envelope: JSON with `v`, the address (run, round, attempt, node), the plan's and the body's SHA-256, the
body's size, the node's public key and its Ed25519 signature of all of these. It travels as one HTTP or
Kafka header, so a body is hashed once and signed without being copied. No pickle, no code.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from atoll.errors import LayoutError, WireError
from atoll.keys import Identity, node_of, signed_by
from atoll.vector import Dtype, Group, Groups, Layout, Layouts, Tensor, Update

VERSION = 1
Buffer = bytes | bytearray | memoryview
HEADER_LIMIT = 16 << 20
"""No header of an update or a model is longer than this, in bytes."""
ENVELOPE_LIMIT = 4096
METRICS_LIMIT = 10_000
"""No update has more metrics than this: each of them is stored for each node and round."""
_DTYPES: Mapping[Dtype, str] = {
    "float32": "F32", "float64": "F64", "int64": "I64", "uint8": "U8", "uint16": "U16", "uint32": "U32", "uint64": "U64",
}  # fmt: skip
_NUMPY = {said: dtype for dtype, said in _DTYPES.items()}


class Address(NamedTuple):
    """Which update this is: one body counts for each address."""

    run: str
    round: int
    attempt: int
    node: str


class Envelope(NamedTuple):
    """What is known, and signed, of a body without opening it."""

    address: Address
    plan: str
    digest: str
    size: int
    key: bytes
    signature: bytes

    @property
    def signed(self) -> bytes:
        """The bytes that the signature covers."""
        return _canonical({"v": VERSION, **self.address._asdict(), "plan": self.plan, "digest": self.digest, "size": self.size})

    def verify(self) -> None:
        """Check that the node named in the address signed this envelope.

        Raises:
            WireError: it didn't.
        """
        if node_of(self.key) != self.address.node:
            raise WireError(f"the key in the envelope is not that of node {self.address.node}")
        if not signed_by(self.key, self.signature, self.signed):
            raise WireError(f"the signature of node {self.address.node} doesn't fit its update: it was altered on the way")

    def to_header(self) -> str:
        """Return the envelope as text for one header."""
        seal = {"key": base64.b64encode(self.key).decode(), "signature": base64.b64encode(self.signature).decode()}
        return (_canonical({**json.loads(self.signed), **seal})).decode()

    @classmethod
    def from_header(cls, text: str | bytes) -> Envelope:
        """Read an envelope back.

        Raises:
            WireError: it is none, or one of another version.
        """
        if len(text) > ENVELOPE_LIMIT:
            raise WireError(f"an envelope of {len(text)} bytes: the limit is {ENVELOPE_LIMIT}")
        try:
            fields = json.loads(text)
            version = fields["v"]
            address = Address(fields["run"], fields["round"], fields["attempt"], fields["node"])
            read = cls(
                address,
                fields["plan"],
                fields["digest"],
                fields["size"],
                base64.b64decode(fields["key"], validate=True),
                base64.b64decode(fields["signature"], validate=True),
            )
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise WireError(f"no envelope of an update: {error!r}") from error
        if version != VERSION:
            raise WireError(f"an envelope of wire version {version}: this side speaks version {VERSION}; upgrade the older one")
        kinds = [(str, (*address[::3], read.plan, read.digest)), (int, (version, address.round, address.attempt, read.size))]
        if not all(type(value) is kind for kind, values in kinds for value in values):
            raise WireError("no envelope of an update: a field has the wrong type")
        if not all(_is_hex(value) for value in (read.plan, read.digest, address.node)) or not _is_name(address.run):
            raise WireError("no envelope of an update: run, plan, node or digest holds characters that don't belong there")
        if not all(0 <= number < 1 << 63 for number in (address.round, address.attempt, read.size)):
            raise WireError("no envelope of an update: round, attempt or size is no count of anything")
        return read


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _is_hex(text: str) -> bool:
    return 0 < len(text) <= 64 and all(c in "0123456789abcdef" for c in text)


def _is_name(text: str) -> bool:
    return 0 < len(text) <= 64 and all(c.isascii() and (c.isalnum() or c in "-_") for c in text)


def seal(identity: Identity, address: Address, plan: str, body: Sequence[Buffer]) -> Envelope:
    """Hash and sign a body that lies in one or more buffers."""
    size = sum(memoryview(part).nbytes for part in body)
    draft = Envelope(address, plan, digest_of(body), size, identity.public, b"")
    return draft._replace(signature=identity.sign(draft.signed))


def digest_of(body: Iterable[Buffer]) -> str:
    """Return the SHA-256 of buffers put one after the other, as hex."""
    sha = hashlib.sha256()
    for part in body:
        sha.update(part)
    return sha.hexdigest()


def pack(groups: Groups, metadata: Mapping[str, str] | None = None) -> list[memoryview]:
    """Return groups as the buffers of one safetensors file, without copying them.

    Tensors with a dtype of more bytes come first and the header is padded to 8, so every array is aligned.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset, flats = 0, []
    for name, group in sorted(groups.items(), key=lambda item: (-item[1].values.itemsize, item[0])):
        for tensor, array in group.arrays.items():
            header[f"{name}/{tensor}"] = {
                "dtype": _DTYPES[group.layout.dtype],
                "shape": list(array.shape),
                "data_offsets": [offset, offset := offset + array.nbytes],
            }
        flats.append(memoryview(np.ascontiguousarray(group.values).data).cast("B"))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return [memoryview(len(text).to_bytes(8, "little") + text), *(flat for flat in flats if flat.nbytes)]


def unpack(body: Buffer, layouts: Layouts) -> tuple[dict[str, Group], dict[str, str]]:
    """Return the groups inside a safetensors body, as views into it, and its metadata.

    Args:
        body: the whole file.
        layouts: the agreed layouts; nothing else is accepted.

    Raises:
        WireError: the bytes are no safetensors file, or one of the wrong length.
        LayoutError: it holds other groups, tensors, shapes or dtypes than agreed.
    """
    view = memoryview(body)
    header, start = _header(view)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise WireError("the header's metadata are not words")
    expected: dict[str, Any] = {}
    offset = 0
    order = sorted(layouts.items(), key=lambda item: (-np.dtype(item[1].dtype).itemsize, item[0]))
    for name, layout in order:
        expected |= _entries(name, layout, offset)
        offset += layout.nbytes
    if header != expected:
        raise LayoutError(f"the body doesn't hold the agreed arrays: {_difference(header, expected)}")
    if view.nbytes != start + offset:
        raise WireError(f"the body has {view.nbytes} bytes, its header says {start + offset}: truncated or doubled")
    groups, lo = {}, start
    for name, layout in order:
        groups[name] = Group(layout, np.frombuffer(view[lo : lo + layout.nbytes], layout.dtype))
        lo += layout.nbytes
    return groups, metadata


def unpack_any(body: Buffer, layouts: Layouts) -> dict[str, Group]:
    """Return groups from anybody's safetensors file, copied: arrays by name, `group/array` or `array`, in any order.

    Raises:
        WireError: the bytes are no safetensors file.
        LayoutError: naming the first array that is missing, has another shape or dtype, or is one too many.
    """
    view = memoryview(body)
    entries, start = _header(view)
    entries.pop("__metadata__", None)
    groups = {}
    for name, layout in layouts.items():
        arrays = {}
        for tensor in layout.tensors:
            said = f"{name}/{tensor.name}"
            if (entry := entries.pop(said, None) or entries.pop(tensor.name, None)) is None:
                raise LayoutError(f"'{said}' is missing; there are: {', '.join(list(entries)[:5]) or 'no more arrays'}")
            arrays[tensor.name] = _array(view[start:], entry, said, layout.dtype, tensor.shape)
        groups[name] = Group(layout, layout.flatten(arrays))
    if entries:
        raise LayoutError(f"'{next(iter(entries))}' is one too many: the plan's model has no such array")
    return groups


def pack_whole(groups: Groups) -> list[memoryview]:
    """Return groups as one safetensors file that says its layouts itself: `unpack_whole` reads it."""
    return pack(groups, {"plain": json.dumps([name for name, group in groups.items() if group.layout.total == "plain"])})


def unpack_whole(body: Buffer) -> dict[str, Group]:
    """Return the groups of a file that `pack_whole` made: for what never leaves a machine, so that nobody agreed on layouts.

    Raises:
        WireError: the bytes are no such file.
        LayoutError: its arrays don't lie as its header says.
    """
    header, _ = _header(memoryview(body))
    tensors: dict[str, list[Tensor]] = {}
    dtypes: dict[str, Dtype] = {}
    try:
        plain = json.loads(header.pop("__metadata__")["plain"])
        for said, entry in header.items():
            name, _, tensor = said.partition("/")
            tensors.setdefault(name, []).append(Tensor(tensor, tuple(entry["shape"])))
            dtypes[name] = _NUMPY[entry["dtype"]]
    except (KeyError, TypeError, ValueError) as error:
        raise WireError(f"no file of groups: {error!r}") from error
    layouts = {
        name: Layout(tuple(found), dtypes[name], "plain" if name in plain else "weighted") for name, found in tensors.items()
    }
    return unpack(body, layouts)[0]


def layouts_said(layouts: Layouts) -> str:
    """Return layouts as one JSON text."""
    said = {
        name: [[[one.name, *one.shape] for one in layout.tensors], layout.dtype, layout.total] for name, layout in layouts.items()
    }
    return json.dumps(said)


def layouts_read(text: str) -> dict[str, Layout]:
    """Return layouts from what `layouts_said` wrote, in a file of one's own."""
    return {
        name: Layout(tuple(Tensor(tensor, tuple(shape)) for tensor, *shape in tensors), dtype, total)
        for name, (tensors, dtype, total) in json.loads(text).items()
    }


def words_of(body: Buffer) -> dict[str, str]:
    """Return the words in a safetensors file's header.

    Raises:
        WireError: it is none.
    """
    return dict(_header(memoryview(body))[0].get("__metadata__", {}))


def _array(view: memoryview, entry: Any, said: str, dtype: Dtype, shape: tuple[int, ...]) -> np.ndarray:
    try:
        is_, (lo, hi) = (entry["dtype"], tuple(entry["shape"])), map(operator.index, entry["data_offsets"])
        size = math.prod(shape) * np.dtype(dtype).itemsize
        if is_ != (_DTYPES[dtype], shape):
            raise LayoutError(f"'{said}' is {is_[0]} {list(is_[1])}, the plan's model has {_DTYPES[dtype]} {list(shape)} there")
        if not 0 <= lo <= hi <= view.nbytes or hi - lo != size:
            raise WireError(f"no whole safetensors file: '{said}' lies outside of it")
    except (KeyError, TypeError, ValueError) as error:
        raise WireError(f"no safetensors file: '{said}' has no dtype, shape and place") from error
    return np.frombuffer(view[lo:hi], dtype).reshape(shape)


def _entries(name: str, layout: Layout, offset: int) -> dict[str, Any]:
    size = np.dtype(layout.dtype).itemsize
    return {
        f"{name}/{tensor.name}": {
            "dtype": _DTYPES[layout.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset + lo * size, offset + hi * size],
        }
        for tensor, lo, hi in zip(layout.tensors, layout.offsets, layout.offsets[1:], strict=False)
    }


def _header(view: memoryview) -> tuple[dict[str, Any], int]:
    length = int.from_bytes(view[:8], "little")
    if view.nbytes < 8 or length > min(HEADER_LIMIT, view.nbytes - 8):
        raise WireError(f"no safetensors body: {view.nbytes} bytes with a header of {length}")
    try:
        header = json.loads(bytes(view[8 : 8 + length]))
    except (ValueError, RecursionError) as error:
        raise WireError("no safetensors body: its header is no JSON") from error
    if not isinstance(header, dict):
        raise WireError("no safetensors body: its header is no JSON object")
    return header, 8 + length


def _difference(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    for name in theirs:
        if name not in ours:
            return f"'{name}' is missing"
        if ours[name] != theirs[name]:
            return f"'{name}' is {ours[name]} instead of {theirs[name]}"
    return f"'{next(name for name in ours if name not in theirs)}' is one too many"


def encode(update: Update, model: str) -> list[memoryview]:
    """Return an update as the buffers of its body.

    Args:
        update: what to send.
        model: the digest of the model it started from.
    """
    metadata = {
        "atoll": str(VERSION),
        "model": model,
        "weight": float(update.weight).hex(),
        "metrics": json.dumps({name: float(value).hex() for name, value in sorted(update.metrics.items())}),
    }
    return pack(update.groups, metadata)


def decode(body: Buffer, layouts: Layouts, model: str) -> Update:
    """Read an update back: arrays are views into `body`; whether their numbers are finite is `vector.check`'s to say.

    Raises:
        WireError: damaged bytes, no weight, no metrics, or started from another model than `model`.
        LayoutError: other arrays than agreed.
    """
    groups, metadata = unpack(body, layouts)
    try:
        weight = float.fromhex(metadata["weight"])
        metrics = {str(name): float.fromhex(value) for name, value in json.loads(metadata["metrics"]).items()}
        started, version = metadata["model"], metadata["atoll"]
    except (KeyError, ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise WireError(f"no update: weight, metrics or model are missing or damaged ({error!r})") from error
    if version != str(VERSION):
        raise WireError(f"an update of wire version {version}: this side speaks version {VERSION}")
    if started != model:
        raise WireError(f"the update started from model {started[:12]}, this round's is {model[:12]}")
    if not (0 < weight <= 1 << 53 and all(map(math.isfinite, metrics.values()))):
        raise WireError("the update's weight is not positive, or no number of rows, or a metric is not finite")
    if len(metrics) > METRICS_LIMIT or not all(len(name) <= 200 and name.isprintable() for name in metrics):
        raise WireError(f"the update has more than {METRICS_LIMIT} metrics, or one whose name is too long or not printable")
    return Update(groups, weight, metrics)
