"""Spectrim inside other frameworks; each module but `registration` needs its extra, and only that imports one."""
