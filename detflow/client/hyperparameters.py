"""The schema of hyper-parameters, as one model family sees it."""

from collections.abc import Iterable, Sequence

from detflow.errors import InvalidArgument
from detflow.v1 import trainer_pb2

Entry = trainer_pb2.Hyperparameter


def families_of(entry: Entry) -> Sequence[str]:
    """Returns the families in which an entry has an effect."""
    return entry.families or sorted(entry.defaults)


def schema_of(schema: Iterable[Entry], family: str) -> Sequence[Entry]:
    """Returns the entries with an effect in a family: with its ranges, and its defaults only.

    Raises:
        InvalidArgument: There is no such family.
    """
    entries = list(schema)
    known = sorted({name for entry in entries for name in families_of(entry)})
    if family not in known:
        raise InvalidArgument(
            f"family must be one of {', '.join(known)}, not {family!r}", reason="UNKNOWN_FAMILY"
        )
    return [_of(entry, family) for entry in entries if family in families_of(entry)]


def _of(entry: Entry, family: str) -> Entry:
    own = Entry()
    own.CopyFrom(entry)
    if family in entry.family_ranges:
        allowed = entry.family_ranges[family]
        own.minimum, own.maximum = allowed.minimum, allowed.maximum
        own.multiple_of = allowed.multiple_of
    own.family_ranges.clear()
    for name in entry.defaults:
        if name != family:
            del own.defaults[name]
    return own
