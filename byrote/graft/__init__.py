"""Engram memory on Hugging Face models: trained, judged against controls, put on, taken off; and facts written into memory."""

from byrote.graft.attach import Graft, attach, detach, grafts

__all__ = ["Graft", "attach", "detach", "grafts"]
