"""Each lie that a server can tell in an encrypted sum, phase by phase, and the node that won't have it; and what it sees."""

from __future__ import annotations

import numpy as np
import pytest

from atoll.errors import LayoutError, PrivacyError
from atoll.keys import Exchange, Identity, derive, encrypt
from atoll.privacy import ckks
from atoll.privacy.encryption import node, server
from atoll.privacy.encryption.tag import Fingerprint, hidden
from atoll.privacy.encryption.update import CIPHERTEXTS, NUMBERS, RING, TAG, Code
from atoll.privacy.secagg import node as masking
from atoll.privacy.secagg import server as gathering
from atoll.privacy.secagg.packing import pack_set, pack_table, set_bytes, unpack_table
from atoll.privacy.secagg.terms import RECORD, Terms, bound, share_key
from atoll.vector import Group, Layout, Tensor, Update

SIZE = 2 * NUMBERS
CODE = Code({"parameters": Layout((Tensor("kernel", (SIZE,)),))}, ("samples",), 1.0, 100, 5)


def terms(number: int = 7, attempt: int = 0, plan: str = "ef" * 32, **more) -> Terms:
    return Terms("run", number, attempt, plan, **{"minimum": 4, "dropout": 0.2, "corrupt": 0, **more})


class Sum:
    """An honest encrypted sum of 5 nodes, up to any phase; `me` is the node that is lied to."""

    def __init__(self, of: Terms | None = None):
        self.terms = of or terms()
        self.identities = {one.node: one for one in (Identity.of(f"encrypter {number}") for number in range(5))}
        self.told = {one: node.advertise(self.terms, identity) for one, identity in self.identities.items()}
        self.gathered, self.cohort = gathering.gather(self.terms, {one: letter for one, (_, letter) in self.told.items()})
        self.names = sorted(self.told)
        self.me, self.other, self.third = self.names[:3]

    def give(self):
        self.given = {one: node.give(self.told[one][0], self.cohort) for one in self.names}
        self.relayed, self.tables = server.relay(self.gathered, {one: letter for one, (_, letter) in self.given.items()})
        return self

    def protect(self):
        self.give()
        self.values, self.states, self.sent = {}, {}, {}
        for place, one in enumerate(self.names):
            self.values[one] = np.random.default_rng(place).uniform(-1, 1, SIZE).astype(np.float32)
            group = Group(CODE.layouts["parameters"], self.values[one])
            update = Update({"parameters": group}, 10.0 + place, {"samples": 5.0})
            self.states[one], self.sent[one] = node.protect(self.given[one][0], self.tables[one], update, CODE)
        return self

    def words(self, one: str) -> np.ndarray:
        return self.sent[one].groups[CIPHERTEXTS].values

    def tag(self, one: str) -> np.ndarray:
        return self.sent[one].groups[TAG].values

    def confirm(self, survivors: list[str] | None = None):
        self.protect()
        self.survivors = survivors or self.names
        closed, self.shown = gathering.close(self.relayed, self.survivors)
        self.signed = {one: node.confirm(self.states[one], self.shown, self.identities[one]) for one in self.survivors}
        self.proven, self.proof = gathering.prove(closed, {one: letter for one, (_, letter) in self.signed.items()})
        self.total = sum(self.words(one) for one in self.survivors)
        self.tags = sum(self.tag(one) for one in self.survivors)
        return self

    def reveal(
        self, words: np.ndarray | None = None, tags: np.ndarray | None = None, *, proof: bytes | None = None, one: str = ""
    ):
        layouts = CODE.protected
        sums = {
            CIPHERTEXTS: Group(layouts[CIPHERTEXTS], self.total if words is None else words),
            TAG: Group(layouts[TAG], self.tags if tags is None else tags),
        }
        return node.reveal(self.signed[one or self.me][0], self.proof if proof is None else proof, sums, CODE)


@pytest.fixture(scope="module")
def honest() -> Sum:
    return Sum().confirm()


def test_the_truth_is_opened_and_by_all_alike(honest):
    opened = {one: honest.reveal(one=one) for one in honest.names}
    assert len(set(opened.values())) == 1
    assert server.openers(honest.proven)
    answer, faults = server.compare(opened, CODE, 5)
    assert not faults
    exact = sum((10.0 + place) * honest.values[one].astype(np.float64) for place, one in enumerate(honest.names))
    found = np.frombuffer(answer, "<f4", offset=len(answer) - 4 * SIZE)
    assert np.abs(found - exact).max() / 60 < 1e-6


# The cohort, and everybody's part of the key.


def records(s: Sum) -> dict[str, bytes]:
    return {one: s.told[one][1] for one in s.names}


def cohort(found: dict[str, bytes]) -> bytes:
    return b"".join(found[one] for one in sorted(found))


def told_again(s: Sum, one: str, of: Terms | None = None) -> bytes:
    return cohort({**records(s), one: node.advertise(of or s.terms, s.identities[one])[1]})


COHORTS = {
    "without me": (lambda s: cohort({one: each for one, each in records(s).items() if one != s.me}), "without this node's own"),
    "my keys of a life before": (lambda s: told_again(s, s.me), "without this node's own keys"),
    "keys of an earlier round": (lambda s: told_again(s, s.other, terms(6)), "not signed by it"),
    "keys of an earlier try": (lambda s: told_again(s, s.other, terms(attempt=1)), "not signed by it"),
    "keys for another plan": (lambda s: told_again(s, s.other, terms(plan="00" * 32)), "not signed by it"),
    "keys for a smaller minimum": (lambda s: told_again(s, s.other, terms(minimum=3)), "not signed by it"),
    "a key that isn't the node's": (
        lambda s: s.cohort[: RECORD + 64] + Exchange(bytes(31) + b"1").public + s.cohort[RECORD + 96 :],
        "not signed by it",
    ),
    "keys of a node that was sent another model": (lambda s: told_again(s, s.other, terms(model="11" * 32)), "not signed by it"),
    "half a record": (lambda s: s.cohort[:-1], "a cohort of"),
    "a node in two roles": (lambda s: s.cohort[: 2 * RECORD] + s.cohort[RECORD:], "names a node twice"),
    "too few": (lambda s: s.cohort[: 3 * RECORD], "a cohort of 3 nodes: at least 4"),
    "nothing": (lambda s: b"", "a cohort of 0"),
}


@pytest.mark.parametrize("lie", COHORTS)
def test_a_lie_about_the_cohort(lie, honest):
    make, words = COHORTS[lie]
    with pytest.raises(PrivacyError, match=words):
        node.give(honest.told[honest.me][0], make(honest))


def test_a_node_of_the_servers_own_beside_the_roster(honest):
    roster = frozenset(honest.names)
    state, mine = node.advertise(terms(roster=roster), honest.identities[honest.me])
    stranger = Identity.new()
    found = {**records(honest), honest.me: mine}
    node.give(state, cohort(found))
    with pytest.raises(PrivacyError, match="is not in the roster"):
        node.give(state, cohort({**found, stranger.node: node.advertise(terms(), stranger)[1]}))


def test_what_is_signed_for_masks_is_nothing_here_and_the_other_way_round(honest):
    from atoll.privacy.encryption.link import encryption

    link = encryption(CODE.layouts, ("samples",), 1.0, 100)
    own, mine = link.answer(link.join(honest.terms, honest.identities[honest.me]), "keys", b"")
    masked = {one: masking.advertise(honest.terms, identity)[1] for one, identity in honest.identities.items()}
    with pytest.raises(PrivacyError, match="not signed by it"):
        link.answer(own, "secrets", cohort({**masked, honest.me: mine}))


def rows_of(s: Sum) -> dict[int, bytes]:
    return unpack_table(s.tables[s.me][set_bytes(5) :], node.GIVEN, 5)


def table(givers: set[int], rows: dict[int, bytes]) -> bytes:
    return pack_set(givers, 5) + pack_table(rows)


ALL = set(range(5))
TABLES = {
    "I gave none": (lambda s: table(ALL - {0}, rows_of(s)), "lacks this node"),
    "one who gave is left out": (lambda s: table(ALL, {k: v for k, v in rows_of(s).items() if k != 3}), "lacks this node, or"),
    "one who gave nothing": (lambda s: table(ALL - {3}, rows_of(s)), "lacks this node, or a secret"),
    "too few gave": (lambda s: table({0, 1, 2}, {k: v for k, v in rows_of(s).items() if k < 3}), "only 3 of 5 nodes gave"),
    "an altered secret": (lambda s: table(ALL, {**rows_of(s), 1: bytes(node.GIVEN)}), "was altered"),
    "another node's secret": (lambda s: table(ALL, {**rows_of(s), 1: rows_of(s)[2]}), "was altered"),
    "a secret for another node": (
        lambda s: table(ALL, {**rows_of(s), 1: unpack_table(s.tables[s.third][set_bytes(5) :], node.GIVEN, 5)[1]}),
        "was altered",
    ),
    "a secret of an earlier round": (lambda s: table(ALL, {**rows_of(s), 1: rows_of(Sum(terms(6)).give())[1]}), "was altered"),
    "a secret twice": (lambda s: s.tables[s.me] + s.tables[s.me][-node.GIVEN - 2 :], "names one twice"),
    "nothing": (lambda s: b"", "isn't one of this cohort"),
    "half a secret": (lambda s: s.tables[s.me][:-1], "is cut"),
}


@pytest.mark.parametrize("lie", TABLES)
def test_a_lie_about_who_gave_what(lie, honest):
    make, words = TABLES[lie]
    update = Update({"parameters": Group(CODE.layouts["parameters"], honest.values[honest.me])}, 1.0)
    with pytest.raises(PrivacyError, match=words):
        node.protect(honest.given[honest.me][0], make(honest), update, CODE)


def test_a_node_that_gives_each_another_secret_is_found():
    s = Sum().give()
    liar, place = s.told[s.other][0], 1
    read = node.read_cohort(s.terms, s.cohort)
    direction = bound(read, place, 0)
    private = Exchange(derive(liar.root, node._SHARES))
    fake = encrypt(share_key(read, private, 0, direction), bytes(32), direction)
    update = Update({"parameters": Group(CODE.layouts["parameters"], np.zeros(SIZE, np.float32))}, 1.0)
    with pytest.raises(PrivacyError, match=f"node {s.other} gave a secret that isn't the one it signed"):
        node.protect(s.given[s.me][0], table(ALL, {**rows_of(s), 1: fake}), update, CODE)


def test_other_cohorts_shown_to_each_half_open_nothing():
    # Nodes 0 and 1 are shown all five, the others not node 4: what the first give is sealed for another cohort.
    s = Sum()
    shown = {one: s.cohort if place < 2 else s.cohort[: 4 * RECORD] for place, one in enumerate(s.names[:4])}
    given = {one: node.give(s.told[one][0], said) for one, said in shown.items()}
    rows = {place: unpack_table(given[one][1], node.GIVEN, 5)[2] for place, one in enumerate(s.names[:4]) if place != 2}
    update = Update({"parameters": Group(CODE.layouts["parameters"], np.zeros(SIZE, np.float32))}, 1.0)
    with pytest.raises(PrivacyError, match="was altered"):
        node.protect(given[s.third][0], pack_set({0, 1, 2, 3}, 4) + pack_table(rows), update, CODE)


def test_other_givers_shown_to_each_half_open_nothing():
    # Nodes 0 and 1 are told that node 4 gave nothing: they have another key than the others. No quorum signs the same.
    s = Sum().give()
    update = Update({"parameters": Group(CODE.layouts["parameters"], np.zeros(SIZE, np.float32))}, 1.0)
    states = {}
    for place, one in enumerate(s.names[:4]):
        rows = unpack_table(s.tables[one][set_bytes(5) :], node.GIVEN, 5)
        told = table(ALL - {4}, {k: v for k, v in rows.items() if k != 4}) if place < 2 else s.tables[one]
        states[one], _ = node.protect(s.given[one][0], told, update, CODE)
    shown = pack_set({0, 1, 2, 3}, 5)
    signed = {one: node.confirm(state, shown, s.identities[one]) for one, state in states.items()}
    proof = pack_table({place: signed[one][1] for place, one in enumerate(s.names[:3])})
    for one in states:
        with pytest.raises(PrivacyError, match="isn't one of these survivors"):
            node.reveal(signed[one][0], proof, {}, CODE)


# Who survived, and what is opened.


SURVIVORS = {
    "without me": (pack_set(ALL - {0}, 5), "without this node"),
    "too few": (pack_set({0, 1, 2}, 5), "only 3 of 5 nodes survived: it takes 4"),
    "nobody": (pack_set(set(), 5), "only 0 of 5"),
    "a node beyond the cohort": (b"\x3f", "isn't one of this cohort"),
    "cut": (b"", "isn't one of this cohort"),
}


@pytest.mark.parametrize("lie", SURVIVORS)
def test_a_lie_about_the_survivors(lie, honest):
    said, words = SURVIVORS[lie]
    with pytest.raises(PrivacyError, match=words):
        node.confirm(honest.states[honest.me], said, honest.identities[honest.me])


def test_a_survivor_who_gave_no_secret():
    s = Sum().give()
    told = table(ALL - {4}, {k: v for k, v in rows_of(s).items() if k != 4})
    update = Update({"parameters": Group(CODE.layouts["parameters"], np.zeros(SIZE, np.float32))}, 1.0)
    state, _ = node.protect(s.given[s.me][0], told, update, CODE)
    with pytest.raises(PrivacyError, match="with one who gave no secret"):
        node.confirm(state, pack_set(ALL, 5), s.identities[s.me])


def signatures(s: Sum) -> dict[int, bytes]:
    return unpack_table(s.proof, 64, 5)


PROOFS = {
    "one signature fewer": (lambda s: pack_table(dict(list(signatures(s).items())[:-1])), "it takes 3"),
    "a forged one": (lambda s: pack_table({**signatures(s), 1: Identity.new().sign(b"x")}), "isn't one of these survivors"),
    "one node's twice": (lambda s: s.proof[:-66] + s.proof[-132:-66], "names one twice"),
    "one node's for another's": (lambda s: pack_table({**signatures(s), 1: signatures(s)[2]}), "isn't one of these survivors"),
    "half of one": (lambda s: s.proof[:-1], "is cut"),
    "those of another try": (lambda s: Sum(terms(attempt=1)).confirm().proof, "isn't one of these survivors"),
    "none": (lambda s: b"", "0 nodes signed"),
}


@pytest.mark.parametrize("lie", PROOFS)
def test_a_lie_about_who_signed(lie, honest):
    make, words = PROOFS[lie]
    with pytest.raises(PrivacyError, match=words):
        honest.reveal(proof=make(honest))


def test_a_signature_by_a_node_that_did_not_survive():
    s = Sum().confirm(Sum().names[:4])
    _, letter = node.confirm(s.states[s.names[4]], pack_set(ALL, 5), s.identities[s.names[4]])
    s.proof = pack_table({**signatures(s), 4: letter})
    with pytest.raises(PrivacyError, match="that didn't survive"):
        s.reveal()


def test_two_sums_of_one_round_are_never_opened():
    # To some all survived, to the others all but node 4: the difference of both sums would be its update.
    s = Sum().protect()
    views = {True: ALL, False: ALL - {4}}
    sees = {one: place < 2 or place == 4 for place, one in enumerate(s.names)}
    signed = {one: node.confirm(s.states[one], pack_set(views[sees[one]], 5), s.identities[one]) for one in s.names}
    opened, refused = set(), []
    for one in s.names:
        alike = [other for other in s.names if sees[other] == sees[one]]
        proof = pack_table({s.names.index(other): signed[other][1] for other in alike})
        words = sum(s.words(s.names[place]) for place in views[sees[one]])
        tags = sum(s.tag(s.names[place]) for place in views[sees[one]])
        s.signed, s.proof = signed, proof
        try:
            s.reveal(words, tags, one=one)
            opened.add(sees[one])
        except PrivacyError as error:
            refused.append(str(error))
    assert opened == {True}  # three of five saw the same; two can't open anything
    assert len(refused) == 2
    assert all("it takes 3" in reason for reason in refused)


def reduced(words: np.ndarray) -> np.ndarray:
    return (words.reshape(-1, *RING.shape) % RING.moduli).reshape(-1)


def lifted(s: Sum) -> np.ndarray:
    """One node's ciphertext, as whole numbers of the sum's size and with its last bits: the same modulo the primes."""
    words, total = s.words(s.other).reshape(-1, *RING.shape), s.total.reshape(-1, *RING.shape)
    return (words + ((total - words) % np.uint64(4)) * RING.moduli).reshape(-1)


SUMS = {
    "one node's ciphertext": lambda s: (s.words(s.other), s.tag(s.other)),
    "one node's ciphertext with the sum's tag": lambda s: (s.words(s.other), None),
    "one node's ciphertext five times": lambda s: (s.words(s.other) * np.uint64(5), s.tag(s.other) * np.uint64(5)),
    "five times with the sum's tag": lambda s: (s.words(s.other) * np.uint64(5), None),
    "one node's ciphertext, lifted": lambda s: (lifted(s), None),
    "the sum without one": lambda s: (s.total - s.words(s.other), s.tags - s.tag(s.other)),
    "the sum and one more of one": lambda s: (s.total + s.words(s.other), s.tags + s.tag(s.other)),
    "one exchanged for another": lambda s: (s.total - s.words(s.other) + s.words(s.third), None),
    "the sum modulo the primes": lambda s: (reduced(s.total), None),
    "the sum times three": lambda s: (s.total * np.uint64(3), s.tags * np.uint64(3)),
    "parts in another order": lambda s: (np.roll(s.total, s.total.size // 3), None),
    "one's first part in the sum": lambda s: (np.concatenate([s.words(s.other)[:100], s.total[100:]]), None),
    "one word altered": lambda s: (np.concatenate([s.total[:1] ^ np.uint64(1 << 63), s.total[1:]]), None),
    "another tag": lambda s: (None, s.tags + np.uint64(1)),
    "nothing but zeros": lambda s: (np.zeros_like(s.total), np.zeros_like(s.tags)),
}


@pytest.mark.parametrize("lie", SUMS)
def test_what_is_not_the_sum_of_the_survivors_is_never_opened(lie, honest):
    with pytest.raises(PrivacyError, match="isn't the sum of the 5 survivors' updates"):
        honest.reveal(*SUMS[lie](honest))


def test_a_sum_of_another_round_or_length_is_not_opened(honest):
    other = Sum(terms(8)).confirm()
    with pytest.raises(PrivacyError, match="isn't the sum of the 5 survivors"):
        honest.reveal(other.total, other.tags)
    short = Group(Layout((Tensor("words", (8,)),), "uint64", "plain"), honest.total[:8])
    with pytest.raises(LayoutError, match="group 'ciphertexts' has another layout"):
        node.reveal(honest.signed[honest.me][0], honest.proof, {CIPHERTEXTS: short, TAG: short}, CODE)


def test_an_update_under_another_key_spoils_the_sum_and_nobody_gives_garbage_away():
    # A node that cheats can spoil a round (it knows the key of tags): what comes out is no sum, and isn't released.
    s = Sum().confirm()
    state = s.states[s.other]
    rogue = list(ckks.encrypt(ckks.Key(RING, b"r" * 32), [np.zeros(RING.slots)] * (s.total.size // (4 * RING.degree)), 2.0**90))
    words = np.stack(rogue).reshape(-1)
    fingerprint = Fingerprint(state.secret)
    fingerprint.add(words)
    total = s.total - s.words(s.other) + words
    tags = s.tags - s.tag(s.other) + hidden(fingerprint.value, state.secret, 1)
    with pytest.raises(PrivacyError, match="opens to what 5 updates never add up to"):
        s.reveal(total, tags)


# What the server sees.


def test_all_that_the_server_gets_tells_nothing_of_the_updates(honest):
    bounds = 5 / np.sqrt(SIZE)  # a correlation by chance is beyond it once in two million
    for one in honest.names:
        words = honest.words(one).reshape(-1, *RING.shape)
        plain = honest.values[one].reshape(-1, NUMBERS)[:2]
        for part in range(2):
            for prime in range(2):
                seen = (words[:2, part, prime] / RING.moduli[prime, 0]).ravel()
                assert abs(np.corrcoef(seen, plain.ravel()[: seen.size])[0, 1]) < bounds
                counts = np.histogram(seen, bins=64, range=(0, 1))[0]
                mean = seen.size / 64
                assert ((counts - mean) ** 2 / mean).sum() < 135
    assert len({honest.tag(one).tobytes() for one in honest.names}) == 5
    secret = honest.states[honest.me].secret
    assert all(state.secret == secret for state in honest.states.values())
    transcript = b"".join(
        (honest.cohort, *(letter for _, letter in honest.given.values()), *honest.tables.values(), honest.shown, honest.proof)
    ) + b"".join(honest.words(one).tobytes() + honest.tag(one).tobytes() for one in honest.names)
    for hidden_ in (secret, *(derive(state.root, node._SECRET) for state, _ in honest.told.values())):
        assert hidden_ not in transcript
        assert hidden_[:8] not in transcript


def test_whoever_has_the_key_reads_every_update_as_the_docs_say(honest):
    # The weak side of this guard, shown: one node that helps the server is enough.
    key = ckks.Key(RING, honest.states[honest.third].secret)
    words = honest.words(honest.me).reshape(-1, *RING.shape)
    slots = np.concatenate(list(ckks.decrypt(key, words, ckks.room_for(RING, 5)))).view(np.float64)
    found = slots[12 : 12 + SIZE] * 100 / 10  # behind three hidden numbers, in four quarters each
    assert np.abs(found - honest.values[honest.me]).max() < 1e-6
