"""Runs torchvision's downloader in a process of its own.

It has no timeout, writes a progress bar to stderr, and would need the process-wide socket timeout changed:
none of that may happen in the user's process. Reads its job as JSON from stdin, writes the reason of a failure
to stdout. Run by path, never imported.
"""

import contextlib
import http.client
import json
import os
import socket
import sys
from pathlib import Path


def main() -> int:
    """Download every file of the job, from the first of its addresses that answers; 0 when all are there."""
    job = json.load(sys.stdin)
    socket.setdefaulttimeout(job["timeout"])
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stderr(nowhere):
        from torchvision.datasets.utils import download_url

        for file in job["files"]:
            reasons = []
            for url in file["urls"]:
                try:
                    download_url(url, job["folder"], filename=file["name"], md5=file["md5"])
                    break
                except (OSError, RuntimeError, http.client.HTTPException) as error:
                    reasons.append(str(getattr(error, "reason", error)))
            else:
                sys.stdout.write(f"{file['name']}: {'; '.join(dict.fromkeys(reasons))}")
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
