"""The executable model of Linux paging: pure, without I/O, clock or randomness."""

from pagelens.model.adopt import Adopted, adopt
from pagelens.model.events import Entry, EventLog
from pagelens.model.fault import AccessResult, FaultEvent
from pagelens.model.files import File
from pagelens.model.machine import Machine
from pagelens.model.process import Process
from pagelens.model.profile import PROFILES, Profile, get_profile
from pagelens.model.space import InitialArea, Layout, Limits

__all__ = [
    "PROFILES",
    "AccessResult",
    "Adopted",
    "Entry",
    "EventLog",
    "FaultEvent",
    "File",
    "InitialArea",
    "Layout",
    "Limits",
    "Machine",
    "Process",
    "Profile",
    "adopt",
    "get_profile",
]
