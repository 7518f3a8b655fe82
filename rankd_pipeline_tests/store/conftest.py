"""Generated cases are judged by what they find, not by how busy the host is."""

from hypothesis import settings

settings.register_profile("no-deadline", deadline=None)
settings.load_profile("no-deadline")
