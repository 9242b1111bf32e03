"""A node's half of a secure sum: `(own state, what came) -> (next state, what goes)`, one function a phase.

Everything random is derived from one secret that `advertise` draws, so a phase repeated with the same message gives the same
bytes. A state is used for one message, and thrown away for the next: who kept an old one and used it with another message
would do what the server may not get it to do. No message gets a second chance: after a refusal, decline the round.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from atoll.errors import PrivacyError
from atoll.keys import SECRET, Exchange, Identity, Keystream, decrypt, derive, encrypt, new_secret
from atoll.privacy.fixed import Words
from atoll.privacy.masks import apply
from atoll.privacy.secagg.packing import pack_table, set_bytes, unpack_set, unpack_table
from atoll.privacy.secagg.terms import (
    SHARES,
    SIGNATURE,
    Cohort,
    Record,
    Terms,
    bound,
    check_signatures,
    enough,
    pair_key,
    read_cohort,
    seed_hash,
    self_key,
    share_key,
    signed_keys,
    signed_survivors,
)
from atoll.privacy.shamir import split

_MASKS, _SHARES, _SEED = b"key for masks", b"key for shares", b"self mask"
"""What a node's secrets are derived for."""


@dataclass(frozen=True)
class Advertised:
    """A node that told its keys."""

    terms: Terms
    record: Record
    root: bytes = field(repr=False)


@dataclass(frozen=True)
class Shared:
    """A node that gave shares of its secrets to the holders it drew.

    Args:
        sealer: its key for shares, which has agreed with the holders already.
    """

    terms: Terms
    cohort: Cohort
    place: int
    holders: frozenset[int]
    root: bytes = field(repr=False)
    sealer: Exchange = field(repr=False)


@dataclass(frozen=True)
class Masked:
    """A node whose update is masked: it keeps its seed and what it holds for others, and no key any more.

    Args:
        sharers: who gave shares, and so could mask.
        held: by node, its pair of shares.
        spoilt: nodes whose shares came altered: nothing can be given for them.
    """

    terms: Terms
    cohort: Cohort
    place: int
    holders: frozenset[int]
    sharers: frozenset[int]
    spoilt: frozenset[int]
    seed: bytes = field(repr=False)
    held: Mapping[int, bytes] = field(repr=False)


@dataclass(frozen=True)
class Confirmed:
    """A node that signed who survived: it will unmask these, and no others."""

    masked: Masked
    survivors: frozenset[int]


def advertise(terms: Terms, identity: Identity) -> tuple[Advertised, bytes]:
    """Draw a secret for this one sum, and tell the public keys that are made of it, signed."""
    root = new_secret()
    seed = seed_hash(derive(root, _SEED))
    keys = (Exchange(derive(root, _MASKS)).public, Exchange(derive(root, _SHARES)).public)
    draft = Record(identity.public, *keys, seed, b"")
    record = draft._replace(signature=identity.sign(signed_keys(terms, draft)))
    return Advertised(terms, record, root), b"".join(record)


def share(state: Advertised, message: bytes) -> tuple[Shared, bytes]:
    """Check the cohort, draw the holders, and send each an encrypted share of both secrets.

    Raises:
        PrivacyError: the cohort isn't one to take part in.
    """
    cohort = read_cohort(state.terms, message, {state.record})
    if state.record not in cohort.records:
        raise PrivacyError("a cohort without this node's own keys")
    place, count = cohort.places[state.record.node], len(cohort.records)
    others = [other for other in range(count) if other != place]
    holders = _draw(others, cohort.graph.degree, Keystream(derive(state.root, b"holders" + cohort.digest)))
    points = [holder + 1 for holder in holders]
    keys, seeds = (
        split(derive(state.root, kind), cohort.graph.threshold, points, Keystream(derive(state.root, kind + cohort.digest)))
        for kind in (_MASKS, _SEED)
    )
    sealer, sealed = Exchange(derive(state.root, _SHARES)), {}
    for holder, key, seed in zip(holders, keys, seeds, strict=True):
        direction = bound(cohort, place, holder)
        sealed[holder] = encrypt(share_key(cohort, sealer, holder, direction), key + seed, direction)
    return Shared(state.terms, cohort, place, frozenset(holders), state.root, sealer), pack_table(sealed)


def mask(state: Shared, message: bytes, parts: Sequence[Words], threads: int | None = None) -> Masked:
    """Mask an update in place: with the node's own seed, and with each neighbour that shares its secrets.

    Args:
        state: what `share` returned.
        message: who gave shares, and the ones for this node.
        parts: flat arrays of uint16, uint32 or uint64: the update's only copy.
        threads: see `atoll.privacy.masks.apply`.

    Raises:
        PrivacyError: too few shared, or the list isn't one of this cohort; nothing was masked.
    """
    cohort, place, count = state.cohort, state.place, len(state.cohort.records)
    width = set_bytes(count)
    sharers, sealed = unpack_set(message[:width], count), unpack_table(message[width:], SHARES, count)
    enough(state.terms, cohort, sharers, "gave shares")
    if place not in sharers or place in sealed or not sealed.keys() <= sharers:
        raise PrivacyError("a list of who gave shares that lacks this node, or names as a giver one who is none")
    held, spoilt = {}, set()
    for giver, pair in sealed.items():
        direction = bound(cohort, giver, place)
        try:
            held[giver] = decrypt(share_key(cohort, state.sealer, giver, direction), pair, direction)
        except PrivacyError:  # whoever altered it: one liar must not stop the round, and this share can't be given
            spoilt.add(giver)
    neighbours = (state.holders | sealed.keys()) & sharers
    private, seed = Exchange(derive(state.root, _MASKS)), derive(state.root, _SEED)
    keys = {other: pair_key(cohort, private, place, other) for other in neighbours}
    plus = [self_key(cohort, seed), *(keys[other] for other in sorted(keys) if other > place)]
    apply(parts, plus, [keys[other] for other in sorted(keys) if other < place], threads)
    return Masked(state.terms, cohort, place, state.holders, sharers, frozenset(spoilt), seed, held)


def confirm(state: Masked, message: bytes, identity: Identity) -> tuple[Confirmed, bytes]:
    """Sign who survived: whose masked updates are in the sum.

    Raises:
        PrivacyError: they are too few to reveal a sum of, or not of those who gave shares, or this node isn't among them.
    """
    survivors = unpack_set(message, len(state.cohort.records))
    enough(state.terms, state.cohort, survivors, "survived")
    if not survivors <= state.sharers or state.place not in survivors:
        raise PrivacyError("survivors without this node, or with one who gave no shares")
    # The graph's bound counts on it: a node whose holders are all called lost would stand alone, unmasked by the others' answers.
    near = len(survivors & (state.holders | {state.place}))
    if near < state.cohort.graph.threshold:
        raise PrivacyError(f"only {near} of this node's holders survived: it takes {state.cohort.graph.threshold}")
    return Confirmed(state, survivors), identity.sign(signed_survivors(state.cohort, state.sharers, survivors))


def unmask(state: Confirmed, message: bytes) -> bytes:
    """Give the own seed, the survivors' shares of theirs, and the lost nodes' shares of their keys; once a quorum signed.

    Raises:
        PrivacyError: too few signed the very survivors that this node did, or a signature is none.
    """
    masked, cohort = state.masked, state.masked.cohort
    signatures = unpack_table(message, SIGNATURE, len(cohort.records))
    if not signatures.keys() <= state.survivors:
        raise PrivacyError("a signature by a node that didn't survive")
    if len(signatures) < cohort.graph.quorum:
        raise PrivacyError(f"{len(signatures)} nodes signed the same survivors: it takes {cohort.graph.quorum}")
    check_signatures(cohort, signatures, signed_survivors(cohort, masked.sharers, state.survivors))
    shares = {giver: pair[SECRET:] if giver in state.survivors else pair[:SECRET] for giver, pair in masked.held.items()}
    return masked.seed + pack_table(shares)


def _draw(others: Sequence[int], count: int, stream: Keystream) -> list[int]:
    """Return so many of the others, each set of them equally likely, in order."""
    pool = list(others)
    for place in range(count if count < len(pool) else 0):
        left = len(pool) - place
        while (drawn := int.from_bytes(stream.take(8), "little")) >= (1 << 64) // left * left:
            pass  # fails once in 2⁵³
        other = place + drawn % left
        pool[place], pool[other] = pool[other], pool[place]
    return sorted(pool[:count])
