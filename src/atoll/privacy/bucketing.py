"""A cohort in buckets, each a whole sum of its own: the server learns one sum a bucket, and a robust rule has what to compare.

Nodes notice nothing but a smaller cohort: each is in one bucket, checks that bucket against the fewest that the plan lets
any sum have, and bears as many corrupt nodes in it as in the whole run. So nobody has to trust the draw: a server that puts
a node among its friends has no more of them there than the node reckons with.

Source: He, Karimireddy, Jaggi 2020, "Secure Byzantine-Robust Machine Learning"; Karimireddy, He, Jaggi 2022,
"Byzantine-Robust Learning on Heterogeneous Datasets via Bucketing", algorithm 1.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from atoll.errors import PrivacyError
from atoll.privacy.link import Bucket, Letters, Link, Own, Undone, reached
from atoll.privacy.secagg.terms import Terms
from atoll.vector import Total


class _Begun(NamedTuple):
    """The server's state before it is known who is there."""

    terms: Terms


class _Split(NamedTuple):
    """The server's state once the buckets are drawn."""

    buckets: tuple[Bucket, ...]


def bucketed(link: Link, buckets: int, enough: int, smallest: int) -> Link:
    """Return a link that makes a sum of each bucket of a cohort, side by side; a node's half stays as it is.

    A bucket whose sum can't be made is left out, with the reason; the others go on. The first phase's answers come in the
    order of their nodes' names: by that the buckets are drawn.

    Args:
        link: makes one sum; its nodes don't see the fold's total.
        buckets: how many; fewer where a cohort doesn't fill so many.
        enough: how few of them there may be in the end.
        smallest: how few nodes there may be in one.
    """

    def split(begun: _Begun, answers: Letters) -> _Split:
        count = min(buckets, len(answers) // smallest)
        if count < enough:
            raise PrivacyError(f"{len(answers)} nodes don't fill {enough} buckets of {smallest} nodes or more")
        return _Split(tuple(Bucket(nodes, link.begin(begun.terms)) for nodes in draw(begun.terms, list(answers), count)))

    def collect(own: Own, phase: str, answers: Letters) -> tuple[Own, Letters]:
        drawn = split(own, answers) if isinstance(own, _Begun) else reached(own, _Split, phase)

        def one(bucket: Bucket) -> tuple[Bucket, Letters]:
            mine = {node: answers[node] for node in bucket.nodes if node in answers}
            after, letters = link.collect(bucket.own, phase, mine)
            kept = tuple(node for node in bucket.nodes if node in letters or phase not in link.before)
            return bucket._replace(own=after, nodes=kept), letters

        return _each(drawn, one, enough)

    def close(own: Own, nodes: Collection[str]) -> tuple[Own, Letters]:
        here = set(nodes)

        def one(bucket: Bucket) -> tuple[Bucket, Letters]:
            mine = tuple(node for node in bucket.nodes if node in here)
            after, letters = link.close(bucket.own, mine)
            return bucket._replace(own=after, nodes=mine), letters

        return _each(reached(own, _Split, "closing"), one, enough)

    return link._replace(
        begin=_Begun,
        collect=collect,
        close=close,
        buckets=lambda own: own.buckets if isinstance(own, _Split) else (),
        least=enough * smallest,
    )


def draw(terms: Terms, nodes: Sequence[str], count: int) -> list[tuple[str, ...]]:
    """Return nodes in so many buckets, whose sizes differ by one at most: by a lot that no node foretells, anew in each round.

    The lots follow from the model that is trained, which all updates so far made, and from the nodes' places: so a replay and
    a simulation draw the same, and so does a repeated try. Of the same updates, sums over other nodes would differ by few.
    """
    common = hashlib.sha256(f"{terms.model} {terms.round} ".encode())

    def lot(place: int) -> bytes:
        own = common.copy()
        own.update(str(place).encode())
        return own.digest()

    places = sorted(range(len(nodes)), key=lot)
    return [tuple(nodes[place] for place in sorted(places[number::count])) for number in range(count)]


def _each(split: _Split, act: Callable[[Bucket], tuple[Bucket, Letters]], enough: int) -> tuple[_Split, Letters]:
    """Let each bucket that is left go on."""
    after, out = list[Bucket](), dict[str, bytes]()
    for number, bucket in enumerate(split.buckets, 1):
        if bucket.lost:
            after.append(bucket)
            continue
        try:
            gone_on, letters = act(bucket)
        except PrivacyError as error:
            after.append(bucket._replace(own=None, lost=_left_out(number, split.buckets, error)))
        else:
            after.append(gone_on)
            out.update(letters)
    if (left := sum(not bucket.lost for bucket in after)) < enough:
        why = next(bucket.lost for bucket in after if bucket.lost)
        raise PrivacyError(f"{left} buckets are left, and it takes {enough}: {why}")
    return _Split(tuple(after)), out


def apart(link: Link, own: Own) -> Callable[[Collection[str]], list[list[str]]] | None:
    """Return what says whose updates are in each sum that can be made; None for a link of one sum."""
    if link.buckets is None:
        return None
    left = [frozenset(bucket.nodes) for bucket in link.buckets(own) if not bucket.lost]

    def by_bucket(nodes: Collection[str]) -> list[list[str]]:
        found = ([node for node in nodes if node in bucket] for bucket in left)
        return [some for some in found if some]

    return by_bucket


def lost(link: Link, own: Own) -> dict[str, str]:
    """Return the nodes whose bucket was left out, and why."""
    return {node: bucket.lost for bucket in (link.buckets(own) if link.buckets else ()) if bucket.lost for node in bucket.nodes}


def undo(link: Link, own: Own, answers: Letters, total: Total, nodes: Collection[str]) -> Undone:
    """Return what a fold's total really is: of these nodes' updates, which are all or a bucket.

    Raises:
        PrivacyError: as `Link.undo`; or no mean comes of it.
    """
    if link.buckets is None:
        return link.undo(own, answers, total)
    buckets = link.buckets(own)
    number, bucket = next(one for one in enumerate(buckets, 1) if not one[1].lost and set(nodes) <= set(one[1].nodes))
    try:
        undone = link.undo(bucket.own, answers, total)
    except PrivacyError as error:
        raise PrivacyError(_left_out(number, buckets, error)) from error
    if not undone.total.weight > 0:  # the sum of what nodes say, and one may say anything
        weight = f"its weights add up to {undone.total.weight:g}, which one of its nodes must have made so"
        raise PrivacyError(_left_out(number, buckets, weight))
    return undone


def _left_out(number: int, buckets: Collection[Bucket], why: object) -> str:
    return f"bucket {number} of {len(buckets)} was left out: {why}"
