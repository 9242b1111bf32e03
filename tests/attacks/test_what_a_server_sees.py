"""What a server and the nodes that work for it can make of a whole secure sum: with one node too few, nothing but the sum.

The coalition takes off every mask that it can compute: those it shares with its own nodes, the seeds that were given to it,
and the masks of nodes that dropped out. What is left of an honest node's update must look like random words.
"""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from atoll.errors import PrivacyError
from atoll.keys import Exchange, Identity, Keystream, derive, new_secret
from atoll.privacy.fixed import Fixed
from atoll.privacy.masks import apply
from atoll.privacy.secagg import node, server
from atoll.privacy.secagg.terms import SECRET, Terms, pair_key, self_key
from atoll.privacy.shamir import PRIME, recover

SIZE = 30_000
CODE = Fixed(1.0, 12, 32)
TERMS = Terms("r", 3, 0, "cd" * 32, 3, 0.25, 0)


class Transcript:
    """All that passes in one round, as the server sees it, and the states that its friends give it."""

    def __init__(self, count: int, bits: int = 32):
        rng = np.random.default_rng(1)
        identities = {one.node: one for one in (Identity.of(f"n{number}") for number in range(count))}
        self.code = Fixed(1.0, count, bits)
        told = {one: node.advertise(TERMS, identity) for one, identity in identities.items()}
        gathered, cohort = server.gather(TERMS, {one: letter for one, (_, letter) in told.items()})
        self.cohort = gathered.cohort
        self.names = list(self.cohort.places)
        shared = {one: node.share(told[one][0], cohort) for one in self.names}
        relayed, tables = server.relay(gathered, {one: letter for one, (_, letter) in shared.items()})
        # Updates as they are: small, alike, with a sign that tells much.
        direction = rng.normal(size=SIZE)
        self.updates = {one: (0.05 * direction + 0.05 * rng.normal(size=SIZE)).astype(np.float32) for one in self.names}
        self.sent = {one: self.code.encode(update) for one, update in self.updates.items()}
        self.plain = {one: words.copy() for one, words in self.sent.items()}
        masked = {one: node.mask(shared[one][0], tables[one], [self.sent[one]]) for one in self.names}
        self.lost = set(self.names[-2:])  # their updates came too late: the server has them, and their keys will be opened
        self.survivors = [one for one in self.names if one not in self.lost]
        closed, survivors = server.close(relayed, self.survivors)
        signed = {one: node.confirm(masked[one], survivors, identities[one]) for one in self.survivors}
        self.proven, proof = server.prove(closed, {one: letter for one, (_, letter) in signed.items()})
        self.given = {one: node.unmask(signed[one][0], proof) for one in self.survivors}
        self.masked, self.roots = masked, {one: told[one][0].root for one in self.names}

    def left_of(self, victim: str, friends: list[str]) -> np.ndarray:
        """Return a victim's update without any mask that the server and its friends can compute."""
        words, place = self.sent[victim].copy(), self.cohort.places[victim]
        keys = {friend: Exchange(derive(self.roots[friend], b"key for masks")) for friend in friends}
        for lost in self.lost:
            keys.setdefault(lost, Exchange(self.opened(lost, self.survivors)))
        for one in self.names:
            if one not in keys and one != victim and (key := self.stolen(one, friends)):
                keys[one] = Exchange(key)
        if victim in self.lost:  # its own key is known: so are all its masks but one
            own = keys[victim]
            for there, record in enumerate(self.cohort.records):
                if record.node not in keys:
                    key = pair_key(self.cohort, own, place, there)
                    apply([words], [key] if there < place else [], [key] if there > place else [])
        for other, private in keys.items():
            if other != victim:
                there = self.cohort.places[other]
                key = pair_key(self.cohort, private, there, place)
                apply([words], [key] if there < place else [], [key] if there > place else [])
        if victim in self.survivors:
            apply([words], [], [self_key(self.cohort, self.given[victim][:SECRET])])
        return words

    def opened(self, lost: str, by: list[str]) -> bytes:
        """Return a lost node's key from what survivors gave."""
        place = self.cohort.places[lost]
        shares = {self.cohort.places[one] + 1: self.masked[one].held[place][:SECRET] for one in by}
        record = self.cohort.records[place]
        return recover(shares, self.cohort.graph.threshold, lambda secret: Exchange(secret).public == record.masks)[0]

    def stolen(self, victim: str, friends: list[str]) -> bytes | None:
        """Return an honest node's key from the shares that friends hold, if those are enough."""
        try:
            return self.opened(victim, friends)
        except PrivacyError:
            return None


def looks(words: np.ndarray, update: np.ndarray) -> tuple[float, float]:
    """Return how far words are from uniform (chi-square of all bytes, in σ), and their correlation with an update, in σ."""
    octets = words.view(np.uint8)
    counts = np.bincount(octets, minlength=256)
    chi = ((counts - octets.size / 256) ** 2 / (octets.size / 256)).sum()
    signed = words.view(f"int{8 * words.itemsize}").astype(np.float64)
    return float((chi - 255) / np.sqrt(2 * 255)), float(np.corrcoef(signed, update)[0, 1] * np.sqrt(SIZE))


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_with_one_friend_fewer_than_the_threshold_every_honest_update_looks_random(bits):
    seen = Transcript(10, bits)
    friends = seen.survivors[: seen.cohort.graph.threshold - 1]
    honest = [one for one in seen.names if one not in friends]
    assert len(honest) >= 5
    for victim in honest:
        chi, correlation = looks(seen.left_of(victim, friends), seen.updates[victim])
        assert abs(chi) < 6
        assert abs(correlation) < 6
    # Nor do two honest updates together tell more: they would if two nodes' masks were alike.
    for one, other in pairwise(honest):
        both = seen.left_of(one, friends) - seen.left_of(other, friends)
        chi, correlation = looks(both, seen.updates[one] - seen.updates[other])
        assert abs(chi) < 6
        assert abs(correlation) < 6


def test_the_same_attack_with_one_friend_more_opens_all():
    seen = Transcript(10)
    friends = seen.survivors[: seen.cohort.graph.threshold]
    for victim in (one for one in seen.survivors if one not in friends):
        words = seen.left_of(victim, friends)
        assert (words == seen.plain[victim]).all()
        assert max(map(abs, looks(words, seen.updates[victim]))) > 100


def test_all_honest_updates_together_are_their_sum():
    seen = Transcript(10)
    friends = seen.survivors[: seen.cohort.graph.threshold - 1]
    honest = [one for one in seen.survivors if one not in friends]
    words = sum(seen.left_of(one, friends) for one in honest)
    assert (words == sum(seen.plain[one] for one in honest)).all()  # what a sum tells, it tells


def test_messages_between_nodes_look_random_to_the_server_and_no_secret_is_in_them():
    seen = Transcript(6)
    secrets = {derive(root, kind) for root in seen.roots.values() for kind in (b"key for masks", b"key for shares")}
    told = b"".join(seen.given.values())
    assert not any(secret in told for secret in secrets)
    for one in seen.names:
        assert seen.roots[one].hex() not in repr(seen.masked[one])
        assert seen.masked[one].seed.hex() not in repr(seen.masked[one])


def test_the_two_secrets_of_a_node_are_shared_by_polynomials_of_their_own():
    # With the same coefficients a pair of shares would tell the difference of the secrets, and a given seed so the key.
    seen = Transcript(6)
    for giver in range(6):
        pairs = [state.held[giver] for one, state in seen.masked.items() if giver in state.held]
        gaps = {(int.from_bytes(pair[:SECRET], "little") - int.from_bytes(pair[SECRET:], "little")) % PRIME for pair in pairs}
        assert len(gaps) == len(pairs) == 5


def test_every_set_of_holders_is_as_likely_as_any_other():
    counts = Counter(tuple(node._draw([0, 1, 3, 4, 5], 2, Keystream(new_secret()))) for _ in range(5000))
    assert len(counts) == 10
    assert sum((count - 500) ** 2 / 500 for count in counts.values()) < 40  # chi-square, 9 degrees of freedom: 1 in 10⁵
