"""Conversations on one picture as one document: the picture once, then branches that do not see each other.

    conversations of a group, each with its Prefix ── share_pictures ──► [first, branch, branch, ...], [alone], ...

The first is a document as any other; a branch has the positions behind the prefix that all of them share, token by
token up to the picture's end, and neither the prefix nor the picture again. A picture is the same by its place, by its
bytes, or by `image_id` with a file of the same size.
"""

import hashlib
import posixpath
from collections import Counter
from collections.abc import Sequence
from typing import Any

from ...processing.sample_error import SampleError
from .forms import IMAGE_ID
from .items import Document
from .record_images import OWN, PlannedImage, image_name
from .texts import image_bytes


def picture_of(shard: int, image: PlannedImage, reference: Any, record: Any) -> tuple:
    """What tells a picture from all others; `bad_image_id` for an `image_id` that is neither a text nor a number."""
    name = record.get(IMAGE_ID)
    if name is not None and (isinstance(name, bool) or not isinstance(name, str | int)):
        raise SampleError("bad_image_id", f"{IMAGE_ID} is a {type(name).__name__}")
    content = image_bytes(reference) if image.root is None else None
    if name not in (None, ""):
        # Numbers of two data sets may meet; files of one number and size do not.
        return image.media.kind, IMAGE_ID, str(name), image.size if content is None else len(content)
    if content is not None:
        return image.media.kind, hashlib.sha256(content).digest()
    own = shard if image.root == OWN else None
    return image.media.kind, own, image.root, image.offset, posixpath.normpath(image_name(reference))


def share_pictures(
    documents: Sequence[Document], max_length: int, max_images: int | None
) -> tuple[list[list[Document]], Counter]:
    """Documents that stand behind each other in a pack: the first with its picture, the others its branches.

    In the order of the first ones; a document begins anew where it would grow above `max_length` or `max_images`. Also
    returns how many conversations have a picture with others and share it with none, by reason: `learned_prefix`
    (an answer before or right behind the picture), `other_prefix` (other tokens up to its end), `no_room`.
    """
    shared: list[list[Document]] = []
    latest: dict[tuple, int] = {}  # by picture and prefix, where the document is that may grow
    for document in documents:
        can_share = document.shareable is not None and not document.shareable.prefix.is_learned
        place = latest.get(document.shareable[:2]) if can_share else None
        if place is not None and _fits(shared[place], branch := _as_branch(document), max_length, max_images):
            shared[place].append(branch)
            continue
        if can_share:
            latest[document.shareable[:2]] = len(shared)
        shared.append([document])
    return shared, _reasons(documents, shared)


def rows_by_picture(rows: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The documents of a pack, as a plan has them, each with its branches."""
    found: list[list[dict[str, Any]]] = []
    for row in rows:
        if row["shared"]:
            found[-1].append(row)
        else:
            found.append([row])
    return found


def _as_branch(document: Document) -> Document:
    tokens = document.shareable.prefix.tokens
    patches = document.patches - document.shareable.patches
    return document._replace(tokens=document.tokens - tokens, shared=tokens, patches=patches)


def _fits(own: list[Document], branch: Document, max_length: int, max_images: int | None) -> bool:
    images = sum(len(document.own_images) for document in (*own, branch))
    tokens = sum(document.tokens for document in (*own, branch))
    return tokens <= max_length and (max_images is None or images <= max_images)


def _reasons(documents: Sequence[Document], shared: list[list[Document]]) -> Counter:
    """Why conversations on a picture of several stand alone."""
    of_picture = Counter(one.shareable.picture for one in documents if one.shareable)
    of_prefix = Counter(one.shareable[:2] for one in documents if one.shareable)
    reasons: Counter = Counter()
    for own in shared:
        shareable = own[0].shareable
        if len(own) > 1 or shareable is None or of_picture[shareable.picture] == 1:
            continue
        has_others = of_prefix[shareable[:2]] > 1
        reasons["learned_prefix" if shareable.prefix.is_learned else "no_room" if has_others else "other_prefix"] += 1
    return reasons
