"""Spectrim inside other frameworks; each module needs its extra, and nothing else imports it."""
