"""Job files: reading YAML with its lines, and decoding it into frozen objects with every problem named at once."""

from lmray.config.base import Config, Member, MemberConfig, Name, checked_name, is_name
from lmray.config.decode import decode, dump, set_value, with_overrides
from lmray.config.reader import Document, read_document

__all__ = [
    "Config",
    "Document",
    "Member",
    "MemberConfig",
    "Name",
    "checked_name",
    "decode",
    "dump",
    "is_name",
    "read_document",
    "set_value",
    "with_overrides",
]
