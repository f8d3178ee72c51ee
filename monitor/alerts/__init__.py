"""Findings as messages: to a command, a webhook, a mailbox or the desktop. Never in the way of a training."""
