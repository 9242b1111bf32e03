"""A node's half of an encrypted sum: `(own state, what came) -> (next state, what goes)`, one function a phase.

Every node gives each other one a secret, sealed for it; the round's key is made of all of them. So the key is fresh if one
node's secret is, nobody's dropping out is missed, and the server, which relays, never has it. A state is used for one
message, and thrown away for the next. No message gets a second chance: after a refusal, decline the round.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from atoll.errors import PrivacyError
from atoll.keys import SEALED, SECRET, Exchange, Identity, decrypt, derive, encrypt, new_secret
from atoll.privacy import ckks
from atoll.privacy.encryption.tag import Fingerprint, hidden, matches
from atoll.privacy.encryption.update import CIPHERTEXTS, FLOOD, LARGEST, RING, TAG, Code
from atoll.privacy.secagg.packing import pack_set, pack_table, set_bytes, unpack_set, unpack_table
from atoll.privacy.secagg.terms import (
    SIGNATURE,
    Cohort,
    Record,
    Terms,
    bound,
    check_signatures,
    enough,
    read_cohort,
    seed_hash,
    share_key,
    signed_keys,
    signed_survivors,
)
from atoll.vector import Group, Groups, Update, check_layouts

GIVEN = SECRET + SEALED
"""Bytes of a secret that is sealed for one node."""
_SHARES, _SECRET = b"key for shares", b"part of the key"


@dataclass(frozen=True)
class Advertised:
    """A node that told its keys."""

    terms: Terms
    record: Record
    root: bytes = field(repr=False)


@dataclass(frozen=True)
class Given:
    """A node that gave its secret to every other one."""

    terms: Terms
    cohort: Cohort
    place: int
    root: bytes = field(repr=False)


@dataclass(frozen=True)
class Encrypted:
    """A node whose update is encrypted; it has the key of all that gave their secrets."""

    terms: Terms
    cohort: Cohort
    place: int
    givers: frozenset[int]
    secret: bytes = field(repr=False)


@dataclass(frozen=True)
class Confirmed:
    """A node that signed who survived: it will open their sum, and nothing else."""

    encrypted: Encrypted
    survivors: frozenset[int]


def advertise(terms: Terms, identity: Identity) -> tuple[Advertised, bytes]:
    """Draw a secret for this one sum, and tell a key for agreement and the hash of what the node will give, signed."""
    root = new_secret()
    public = Exchange(derive(root, _SHARES)).public
    draft = Record(identity.public, public, public, seed_hash(derive(root, _SECRET)), b"")
    record = draft._replace(signature=identity.sign(signed_keys(terms, draft)))
    return Advertised(terms, record, root), b"".join(record)


def give(state: Advertised, message: bytes) -> tuple[Given, bytes]:
    """Check the cohort, and give every other node of it this one's secret, sealed.

    Raises:
        PrivacyError: the cohort isn't one to take part in.
    """
    cohort = read_cohort(state.terms, message)
    if state.record not in cohort.records:
        raise PrivacyError("a cohort without this node's own keys")
    if len(cohort.records) > LARGEST:
        raise PrivacyError(f"a cohort of {len(cohort.records)} nodes: at most {LARGEST} nodes' ciphertexts can be added up")
    place, private = cohort.places[state.record.node], Exchange(derive(state.root, _SHARES))
    secret, sealed = derive(state.root, _SECRET), {}
    for other in set(range(len(cohort.records))) - {place}:
        direction = bound(cohort, place, other)
        sealed[other] = encrypt(share_key(cohort, private, other, direction), secret, direction)
    return Given(state.terms, cohort, place, state.root), pack_table(sealed)


def protect(state: Given, message: bytes, update: Update, code: Code) -> tuple[Encrypted, Update]:
    """Make the key of all that gave their secrets, and encrypt an update with it.

    Args:
        state: what `give` returned.
        message: who gave, and what they gave this node.
        update: what to encrypt.
        code: how the cohort writes updates.

    Raises:
        PrivacyError: too few gave, or a secret is missing, or isn't the one that its node signed the hash of.
        LayoutError: a number of the update is larger than agreed.
    """
    cohort, place, count = state.cohort, state.place, len(state.cohort.records)
    width = set_bytes(count)
    givers, sealed = unpack_set(message[:width], count), unpack_table(message[width:], GIVEN, count)
    enough(state.terms, cohort, givers, "gave their secrets")
    if place not in givers or sealed.keys() != givers - {place}:
        raise PrivacyError("a list of who gave secrets that lacks this node, or a secret of one of them")
    private = Exchange(derive(state.root, _SHARES))
    secrets = {place: derive(state.root, _SECRET)}
    for giver, data in sealed.items():
        direction = bound(cohort, giver, place)
        secrets[giver] = decrypt(share_key(cohort, private, giver, direction), data, direction)
        if seed_hash(secrets[giver]) != cohort.records[giver].seed:
            raise PrivacyError(f"node {cohort.records[giver].node} gave a secret that isn't the one it signed the hash of")
    whole = hashlib.sha256(b"".join(secrets[giver] for giver in sorted(secrets))).digest()
    secret = derive(whole, b"ckks " + cohort.digest + pack_set(givers, count))
    encrypted = Encrypted(state.terms, cohort, place, givers, secret)
    return encrypted, _encrypted(encrypted, update, code)


def confirm(state: Encrypted, message: bytes, identity: Identity) -> tuple[Confirmed, bytes]:
    """Sign who survived: whose encrypted updates are in the sum.

    Raises:
        PrivacyError: they are too few to open a sum of, or not of those who gave secrets, or this node isn't among them.
    """
    survivors = unpack_set(message, len(state.cohort.records))
    enough(state.terms, state.cohort, survivors, "survived")
    if not survivors <= state.givers or state.place not in survivors:
        raise PrivacyError("survivors without this node, or with one who gave no secret")
    return Confirmed(state, survivors), identity.sign(signed_survivors(state.cohort, state.givers, survivors))


def reveal(state: Confirmed, message: bytes, sums: Groups, code: Code) -> bytes:
    """Open the survivors' sum, once a quorum signed who they are, and its tag shows that it is theirs and nothing else.

    What comes out is flooded and rounded before it is given away, and the same from every node.

    Args:
        state: what `confirm` returned.
        message: the signatures.
        sums: the groups of the total.
        code: how the cohort writes updates.

    Raises:
        PrivacyError: too few signed these survivors, or the sum isn't that of their updates.
        LayoutError: it isn't a sum of this model's updates.
    """
    encrypted, cohort = state.encrypted, state.encrypted.cohort
    signatures = unpack_table(message, SIGNATURE, len(cohort.records))
    if not signatures.keys() <= state.survivors:
        raise PrivacyError("a signature by a node that didn't survive")
    if len(signatures) < cohort.graph.quorum:
        raise PrivacyError(f"{len(signatures)} nodes signed the same survivors: it takes {cohort.graph.quorum}")
    check_signatures(cohort, signatures, signed_survivors(cohort, encrypted.givers, state.survivors))
    check_layouts(sums, code.protected)
    words, fingerprint = sums[CIPHERTEXTS].arrays["words"], Fingerprint(encrypted.secret)
    fingerprint.add(words)
    if not matches(fingerprint.value, sums[TAG].values, encrypted.secret, state.survivors):
        raise PrivacyError(f"what is offered to be opened isn't the sum of the {len(state.survivors)} survivors' updates")
    key, scale = ckks.Key(RING, encrypted.secret), ckks.room_for(RING, code.nodes)
    flood = ckks.Flood(derive(encrypted.secret, b"flood"), FLOOD)
    return code.gather(ckks.decrypt(key, iter(words), scale, flood), len(state.survivors))


def _encrypted(state: Encrypted, update: Update, code: Code) -> Update:
    layouts = code.protected
    words = np.empty(layouts[CIPHERTEXTS].tensors[0].shape, np.uint64)
    fingerprint = Fingerprint(state.secret)
    for place, ciphertext in enumerate(_ciphertexts(state, update, code)):
        words[place] = ciphertext
        fingerprint.add(ciphertext)
    groups = {
        CIPHERTEXTS: Group(layouts[CIPHERTEXTS], words.reshape(-1)),
        TAG: Group(layouts[TAG], hidden(fingerprint.value, state.secret, state.place)),
    }
    return Update(groups, 1.0, dict.fromkeys(update.metrics, 0.0))  # who adds up knows by the names which sums mean something


def _ciphertexts(state: Encrypted, update: Update, code: Code) -> Iterator[ckks.Ciphertext]:
    key, scale = ckks.Key(RING, state.secret), ckks.room_for(RING, code.nodes)
    return ckks.encrypt(key, code.slots(update), scale)
