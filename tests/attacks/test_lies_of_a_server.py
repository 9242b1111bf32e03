"""Each lie that a server can tell in a secure sum, phase by phase, and the node that won't have it."""

from __future__ import annotations

import numpy as np
import pytest

from atoll.errors import PrivacyError
from atoll.keys import Exchange, Identity, new_secret, node_of
from atoll.privacy.secagg import node, server
from atoll.privacy.secagg.packing import pack_set, pack_table, set_bytes, unpack_table
from atoll.privacy.secagg.terms import RECORD, SECRET, SHARES, Terms, signed_keys

PLAN = "ef" * 32
WORDS = 8


def terms(number: int = 7, attempt: int = 0, plan: str = PLAN, **more) -> Terms:
    return Terms("run", number, attempt, plan, **{"minimum": 4, "dropout": 0.3, "corrupt": 0, **more})


class Sum:
    """An honest sum of 7 nodes, up to any phase; `me` is the node that is lied to."""

    def __init__(self, count: int = 7, of: Terms | None = None):
        self.terms = of or terms()
        self.identities = {one.node: one for one in (Identity.of(f"liar's {number}") for number in range(count))}
        self.told = {one: node.advertise(self.terms, identity) for one, identity in self.identities.items()}
        self.gathered, self.cohort = server.gather(self.terms, {one: letter for one, (_, letter) in self.told.items()})
        self.names = sorted(self.told)
        self.me, self.other, self.third = self.names[0], self.names[1], self.names[2]

    def share(self):
        self.shared = {one: node.share(self.told[one][0], self.cohort) for one in self.names}
        self.relayed, self.tables = server.relay(self.gathered, {one: letter for one, (_, letter) in self.shared.items()})
        return self

    def mask(self):
        self.share()
        self.masked = {one: node.mask(self.shared[one][0], self.tables[one], [np.zeros(WORDS, np.uint32)]) for one in self.names}
        return self

    def confirm(self, survivors: list[str] | None = None):
        self.mask()
        self.survivors = survivors or self.names
        self.closed, self.shown = server.close(self.relayed, self.survivors)
        self.signed = {one: node.confirm(self.masked[one], self.shown, self.identities[one]) for one in self.survivors}
        self.proven, self.proof = server.prove(self.closed, {one: letter for one, (_, letter) in self.signed.items()})
        return self

    def records(self) -> list[bytes]:
        return [self.cohort[lo : lo + RECORD] for lo in range(0, len(self.cohort), RECORD)]


def id_of(record: bytes) -> str:
    return node_of(record[:32])


def cohort(records) -> bytes:
    return b"".join(sorted(records, key=id_of))


# Phase 1: the cohort that a node is shown.


def other_key(s: Sum) -> bytes:
    at = 1 * RECORD + 64  # the second node's key for shares: the server's own instead
    return s.cohort[:at] + Exchange(new_secret()).public + s.cohort[at + 32 :]


def other_seed(s: Sum) -> bytes:
    at = 1 * RECORD + 96
    return s.cohort[:at] + bytes(32) + s.cohort[at + 32 :]


def from_another(**changed):
    def lie(s: Sum) -> bytes:
        _, letter = node.advertise(terms(**changed), s.identities[s.other])
        return cohort([letter if id_of(record) == s.other else record for record in s.records()])

    return lie


def without_me(s: Sum) -> bytes:
    return cohort(record for record in s.records() if id_of(record) != s.me)


def other_keys_of_mine(s: Sum) -> bytes:
    _, letter = node.advertise(s.terms, s.identities[s.me])  # truly signed by this node, in a life before it restarted
    return cohort([letter if id_of(record) == s.me else record for record in s.records()])


def in_two_roles(s: Sum) -> bytes:
    _, letter = node.advertise(s.terms, s.identities[s.other])
    return cohort([*s.records(), letter])


def copied_keys(s: Sum) -> bytes:
    record = s.told[s.other][0].record
    thief = s.identities[s.third]
    draft = record._replace(key=thief.public)
    copy = b"".join(draft._replace(signature=thief.sign(signed_keys(s.terms, draft))))
    return cohort([copy if id_of(one) == s.third else one for one in s.records()])


COHORTS = {
    "a key that isn't the node's": (other_key, "not signed by it"),
    "a seed's hash that isn't the node's": (other_seed, "not signed by it"),
    "keys of an earlier round": (from_another(number=6), "not signed by it"),
    "keys of an earlier try": (from_another(attempt=1), "not signed by it"),
    "keys for another plan": (from_another(plan="00" * 32), "not signed by it"),
    "keys for a smaller minimum": (from_another(minimum=3), "not signed by it"),
    "keys of a node that was sent another model": (from_another(model="11" * 32), "not signed by it"),
    "keys for other fractions": (from_another(dropout=0.1), "not signed by it"),
    "a cohort without me": (without_me, "without this node's own keys"),
    "my keys of a life before": (other_keys_of_mine, "without this node's own keys"),
    "a node in two roles": (in_two_roles, "names a node twice"),
    "a node with another's keys": (copied_keys, "copied"),
    "a cohort in another order": (lambda s: b"".join(reversed(s.records())), "isn't in the order"),
    "a cohort below the minimum": (lambda s: b"".join(s.records()[:3]), "a cohort of 3 nodes: at least 4"),
    "half a record": (lambda s: s.cohort[:-1], "a cohort of"),
    "nothing": (lambda s: b"", "a cohort of 0"),
}


@pytest.mark.parametrize("lie", COHORTS)
def test_a_lie_about_the_cohort(lie):
    make, words = COHORTS[lie]
    s = Sum()
    node.share(s.told[s.me][0], s.cohort)  # the truth is taken
    with pytest.raises(PrivacyError, match=words):
        node.share(s.told[s.me][0], make(s))


def test_a_node_of_the_servers_own_beside_the_roster():
    s = Sum()
    roster = frozenset(s.names)
    _, stranger = node.advertise(s.terms, Identity.new())
    state, _ = node.advertise(terms(roster=roster), s.identities[s.me])
    mine = [b"".join(state.record) if id_of(record) == s.me else record for record in s.records()]
    node.share(state, cohort(mine))
    with pytest.raises(PrivacyError, match="is not in the roster"):
        node.share(state, cohort([*mine, stranger]))


def test_a_weak_key_of_a_friend_is_found_by_the_server_and_by_the_node():
    s = Sum()
    friend = s.identities[s.other]
    draft = s.told[s.other][0].record._replace(shares=bytes(32))
    weak = b"".join(draft._replace(signature=friend.sign(signed_keys(s.terms, draft))))
    gathered, _ = server.gather(s.terms, {**{one: letter for one, (_, letter) in s.told.items()}, s.other: weak})
    assert "a weak one" in gathered.faults[s.other]
    with pytest.raises(PrivacyError, match="a weak one"):
        node.share(s.told[s.me][0], cohort([weak if id_of(record) == s.other else record for record in s.records()]))


# Phase 2: who gave shares, and the shares for this node.


def split_table(s: Sum) -> tuple[bytes, dict[int, bytes]]:
    width = set_bytes(len(s.names))
    return s.tables[s.me][:width], unpack_table(s.tables[s.me][width:], SHARES, len(s.names))


def givers(*places: int):
    return lambda s: pack_set(set(places), len(s.names)) + pack_table({k: v for k, v in split_table(s)[1].items() if k in places})


def doubled(s: Sum) -> bytes:
    told, rows = split_table(s)
    return told + pack_table(rows) + pack_table({6: rows[6]})


TABLES = {
    "I gave none": (givers(1, 2, 3, 4, 5, 6), "lacks this node"),
    "too few gave some": (givers(0, 1, 2), "only 3 of 7 nodes gave shares: it takes 4"),
    "one who is no giver": (lambda s: pack_set({0, 1, 2, 3, 4}, 7) + pack_table(split_table(s)[1]), "one who is none"),
    "a share of my own": (lambda s: s.tables[s.me][:1] + pack_table({**split_table(s)[1], 0: bytes(SHARES)}), "lacks this node"),
    "a share twice": (doubled, "names one twice"),
    "a node beyond the cohort": (lambda s: bytes([255]) + s.tables[s.me][1:], "isn't one of this cohort"),
    "half a share": (lambda s: s.tables[s.me][:-1], "is cut"),
    "nothing": (lambda s: b"", "isn't one of this cohort"),
}


@pytest.mark.parametrize("lie", TABLES)
def test_a_lie_about_who_gave_shares(lie):
    make, words = TABLES[lie]
    s = Sum().share()
    parts = [np.zeros(WORDS, np.uint32)]
    with pytest.raises(PrivacyError, match=words):
        node.mask(s.shared[s.me][0], make(s), parts)
    assert not parts[0].any()  # and nothing was done to the update
    node.mask(s.shared[s.me][0], s.tables[s.me], parts)  # the truth is taken
    assert parts[0].any()


def altered(s: Sum, rows: dict[int, bytes]) -> bytes:
    return rows[1][:-1] + bytes([rows[1][-1] ^ 1])


def of_another_giver(s: Sum, rows: dict[int, bytes]) -> bytes:
    return rows[2]


def for_another_holder(s: Sum, rows: dict[int, bytes]) -> bytes:
    width = set_bytes(len(s.names))
    return unpack_table(s.tables[s.third][width:], SHARES, len(s.names))[1]


def of_an_earlier_round(s: Sum, rows: dict[int, bytes]) -> bytes:
    return split_table(Sum(of=terms(6)).share())[1][1]


def my_own_sent_back(s: Sum, rows: dict[int, bytes]) -> bytes:
    return unpack_table(s.shared[s.me][1], SHARES, len(s.names))[1]  # the same two keys agree on its encryption


@pytest.mark.parametrize("lie", [altered, of_another_giver, for_another_holder, of_an_earlier_round, my_own_sent_back])
def test_a_share_that_is_not_the_givers_for_me_is_never_given(lie):
    s = Sum().share()
    told, rows = split_table(s)
    message = told + pack_table({**rows, 1: lie(s, rows)})
    masked = node.mask(s.shared[s.me][0], message, [np.zeros(WORDS, np.uint32)])
    assert masked.spoilt == {1}
    assert 1 not in masked.held
    assert masked.held.keys() == rows.keys() - {1}


# Phase 3: who survived.

SURVIVORS = {
    "without me": ({1, 2, 3, 4, 5, 6}, "without this node"),
    "below the minimum": ({0, 1, 2}, "only 3 of 7 nodes survived: it takes 4"),
    "nobody": (set(), "only 0 of 7"),
}


@pytest.mark.parametrize("lie", SURVIVORS)
def test_a_lie_about_the_survivors(lie):
    places, words = SURVIVORS[lie]
    s = Sum().mask()
    with pytest.raises(PrivacyError, match=words):
        node.confirm(s.masked[s.me], pack_set(places, 7), s.identities[s.me])
    node.confirm(s.masked[s.me], pack_set({0, 1, 2, 3}, 7), s.identities[s.me])


@pytest.mark.parametrize("said", [b"", b"\x7f\x00", b"\xff"], ids=["nothing", "too long", "a node beyond the cohort"])
def test_a_set_of_survivors_of_another_length(said):
    s = Sum().mask()
    with pytest.raises(PrivacyError, match="isn't one of this cohort"):
        node.confirm(s.masked[s.me], said, s.identities[s.me])


def test_a_survivor_who_gave_no_shares():
    s = Sum().share()
    told = {one: letter for one, (_, letter) in s.shared.items() if one != s.third}
    _, tables = server.relay(s.gathered, told)
    masked = node.mask(s.shared[s.me][0], tables[s.me], [np.zeros(WORDS, np.uint32)])
    with pytest.raises(PrivacyError, match="who gave no shares"):
        node.confirm(masked, pack_set(set(range(7)), 7), s.identities[s.me])


def test_survivors_that_leave_a_node_alone_in_a_sparse_graph():
    # Enough survive in all, but of this node's own holders too few: the others' answers would take off all its masks.
    count = 60
    s = Sum(count, terms(dropout=0.1, corrupt=6)).share()
    masked = node.mask(s.shared[s.me][0], s.tables[s.me], [np.zeros(WORDS, np.uint32)])
    graph = masked.cohort.graph
    assert graph.degree < count - 1
    far = set(range(count)) - masked.holders - {masked.place}
    survivors = far | {masked.place} | set(sorted(masked.holders)[: graph.threshold - 2])
    assert len(survivors) >= graph.quorum
    with pytest.raises(PrivacyError, match=f"only {graph.threshold - 1} of this node's holders survived"):
        node.confirm(masked, pack_set(survivors, count), s.identities[s.me])
    node.confirm(masked, pack_set(survivors | masked.holders, count), s.identities[s.me])


# Phase 4: the survivors' signatures, before anything is given.


def rows_of(s: Sum) -> dict[int, bytes]:
    return unpack_table(s.proof, 64, len(s.names))


def one_fewer(s: Sum) -> bytes:
    return pack_table(dict(list(rows_of(s).items())[:-1]))


def forged(s: Sum) -> bytes:
    return pack_table({**rows_of(s), 1: Identity.new().sign(b"whatever")})


def of_one_node_for_another(s: Sum) -> bytes:
    return pack_table({**rows_of(s), 1: rows_of(s)[2]})


def twice(s: Sum) -> bytes:
    return s.proof[:-66] + s.proof[-132:-66]


def of_an_earlier_try(s: Sum) -> bytes:
    return Sum(of=terms(attempt=1)).confirm().proof


PROOFS = {
    "one signature fewer": (one_fewer, "3 nodes signed the same survivors: it takes 4"),
    "a forged one": (forged, "isn't one of these survivors"),
    "one node's for another's": (of_one_node_for_another, "isn't one of these survivors"),
    "one node's twice": (twice, "names one twice"),
    "those of an earlier try": (of_an_earlier_try, "isn't one of these survivors"),
    "half of one": (lambda s: s.proof[:-1], "is cut"),
    "none": (lambda s: b"", "0 nodes signed"),
}


@pytest.mark.parametrize("lie", PROOFS)
def test_a_lie_about_who_signed(lie):
    make, words = PROOFS[lie]
    s = Sum().confirm()
    with pytest.raises(PrivacyError, match=words):
        node.unmask(s.signed[s.me][0], make(s))
    node.unmask(s.signed[s.me][0], s.proof)


def test_a_signature_by_a_node_that_did_not_survive():
    s = Sum()
    s.confirm(s.names[:5])
    late, _ = server.close(s.relayed, s.names)
    _, letter = node.confirm(s.masked[s.names[6]], pack_set(set(range(7)), 7), s.identities[s.names[6]])
    rows = {**rows_of(s), 6: letter}
    rows.pop(0)
    assert late
    with pytest.raises(PrivacyError, match="that didn't survive"):
        node.unmask(s.signed[s.me][0], pack_table(rows))


def test_other_survivors_shown_to_each_half_of_the_cohort():
    # The classic: to some a victim is lost (they would give its key's shares), to others it survived (its seed's).
    s = Sum().mask()
    views = {True: set(range(7)), False: set(range(6))}
    shown = {one: place >= 3 for place, one in enumerate(s.names)}
    signed = {one: node.confirm(s.masked[one], pack_set(views[shown[one]], 7), s.identities[one]) for one in s.names}
    gave, refused = set(), []
    for one in s.names:
        alike = {place: signed[other][1] for place, other in enumerate(s.names) if shown[other] == shown[one]}
        for proof in (alike, {place: signed[s.names[place]][1] for place in views[shown[one]]}):
            try:
                node.unmask(signed[one][0], pack_table(proof))
                gave.add(shown[one])
            except PrivacyError as error:
                refused.append(str(error))
    assert gave == {True}  # four of seven saw the same: they give one kind, and the three others nothing
    assert all("it takes 4" in reason or "isn't one of these survivors" in reason for reason in refused)


def test_other_cohorts_shown_to_each_half():
    # Nodes 0 to 3 are shown nodes 0 to 4, node 4 is shown 1 to 5. All else is the same: all five shared, all five survived.
    s = Sum(6)
    groups = [cohort(s.records()[:5]), cohort(s.records()[1:])]
    seen = {one: groups[place == 4] for place, one in enumerate(s.names[:5])}
    states = {one: node.share(s.told[one][0], seen[one])[0] for one in seen}
    everyone = pack_set(set(range(5)), 5)
    masked = {one: node.mask(state, everyone, [np.zeros(WORDS, np.uint32)]) for one, state in states.items()}
    signed = {one: node.confirm(state, everyone, s.identities[one]) for one, state in masked.items()}
    quorum = masked[s.me].cohort.graph.quorum
    truth = pack_table({place: signed[s.names[place]][1] for place in range(quorum)})
    node.unmask(signed[s.me][0], truth)
    lie = pack_table({place: signed[s.names[place]][1] for place in (*range(quorum - 1), 4)})
    with pytest.raises(PrivacyError, match="isn't one of these survivors"):
        node.unmask(signed[s.me][0], lie)


def test_other_givers_shown_to_each_half():
    s = Sum().share()
    width, views = set_bytes(7), [set(range(7)), set(range(6))]
    masked = {}
    for place, one in enumerate(s.names[:6]):
        view = views[place < 3]
        rows = {k: v for k, v in unpack_table(s.tables[one][width:], SHARES, 7).items() if k in view}
        masked[one] = node.mask(s.shared[one][0], pack_set(view, 7) + pack_table(rows), [np.zeros(WORDS, np.uint32)])
    survivors = pack_set(set(range(6)), 7)
    signed = {one: node.confirm(state, survivors, s.identities[one]) for one, state in masked.items()}
    proof = pack_table({place: signed[one][1] for place, one in enumerate(masked)})
    for one in masked:
        with pytest.raises(PrivacyError, match="isn't one of these survivors"):
            node.unmask(signed[one][0], proof)


def test_never_both_kinds_of_share_for_one_node():
    s = Sum()
    s.confirm(s.names[:6])
    given = node.unmask(s.signed[s.me][0], s.proof)
    rows = unpack_table(given[SECRET:], SECRET, 7)
    held = s.masked[s.me].held
    assert rows == {place: held[place][SECRET:] if place < 6 else held[place][:SECRET] for place in held}
    # Asked again as if another had been lost, with the signatures that it has, it gives nothing.
    again, _ = node.confirm(s.masked[s.me], pack_set(set(range(5)), 7), s.identities[s.me])
    with pytest.raises(PrivacyError, match=r"isn't one of these survivors|didn't survive"):
        node.unmask(again, s.proof)


# What corrupt nodes send: the server names them, and goes on.


def test_a_wrong_share_is_named_and_the_sum_is_right_all_the_same():
    s = Sum()
    s.confirm(s.names[:6])
    given = {one: node.unmask(s.signed[one][0], s.proof) for one in s.survivors}
    liar = s.names[0]
    rows = unpack_table(given[liar][SECRET:], SECRET, 7)
    given[liar] = given[liar][:SECRET] + pack_table({**rows, 6: bytes(32)})
    total = [np.zeros(WORDS, np.uint32)]
    faults = server.unmask(s.proven, given, total)
    assert faults == {liar: f"gave a wrong share of the key of node {s.names[6]}"}
    honest = {**given, liar: node.unmask(s.signed[liar][0], s.proof)}
    again = [np.zeros(WORDS, np.uint32)]
    assert server.unmask(s.proven, honest, again) == {}
    assert (total[0] == again[0]).all()


def test_a_seed_that_is_not_the_nodes_own_is_left_and_made_of_the_others_shares():
    s = Sum().confirm()
    given = {one: node.unmask(s.signed[one][0], s.proof) for one in s.names}
    honest, total = [np.zeros(WORDS, np.uint32)], [np.zeros(WORDS, np.uint32)]
    server.unmask(s.proven, given, honest)
    faults = server.unmask(s.proven, {**given, s.me: bytes(32) + given[s.me][32:]}, total)
    assert "a seed that isn't its own" in faults[s.me]
    assert (total[0] == honest[0]).all()


def test_too_many_wrong_shares_abandon_the_sum_and_leave_it_masked():
    s = Sum()
    s.confirm(s.names[:6])
    given = {one: node.unmask(s.signed[one][0], s.proof) for one in s.survivors}
    for liar in s.names[:4]:
        rows = unpack_table(given[liar][SECRET:], SECRET, 7)
        given[liar] = given[liar][:SECRET] + pack_table({**rows, 6: bytes(32)})
    total = [np.arange(WORDS, dtype=np.uint32)]
    with pytest.raises(PrivacyError, match=f"the key of node {s.names[6]}, which dropped out, can't be had"):
        server.unmask(s.proven, given, total)
    assert (total[0] == np.arange(WORDS)).all()


@pytest.mark.parametrize("letter", [b"", b"x", bytes(82), bytes(82 * 6)], ids=["nothing", "a byte", "one share", "six of one"])
def test_shares_that_are_none_drop_only_who_sent_them(letter):
    s = Sum().share()
    relayed, _ = server.relay(s.gathered, {**{one: told for one, (_, told) in s.shared.items()}, s.other: letter})
    assert relayed.sharers == frozenset(range(7)) - {1}
    assert set(relayed.faults) == {s.other}


def test_a_signature_of_something_else_drops_only_who_sent_it():
    s = Sum().confirm()
    letters = {one: letter for one, (_, letter) in s.signed.items()}
    proven, _ = server.prove(s.closed, {**letters, s.other: letters[s.me], "stranger": b""})
    assert set(proven.faults) == {s.other}
    assert proven.signatures.keys() == set(range(7)) - {1}


def test_another_nodes_keys_drop_only_who_sent_them():
    s = Sum()
    letters = {one: letter for one, (_, letter) in s.told.items()}
    gathered, _ = server.gather(s.terms, {**letters, s.other: letters[s.third]})
    assert set(gathered.faults) == {s.other}
    assert s.other not in gathered.cohort.places


def test_an_update_by_a_node_that_gave_no_shares_is_not_summed():
    s = Sum().share()
    relayed, _ = server.relay(s.gathered, {one: letter for one, (_, letter) in s.shared.items() if one != s.third})
    with pytest.raises(PrivacyError, match="gave no shares can't be read"):
        server.close(relayed, s.names)
    with pytest.raises(PrivacyError, match="gave no shares can't be read"):
        server.close(relayed, [*s.names[3:], "stranger"])
    server.close(relayed, [one for one in s.names if one != s.third])
