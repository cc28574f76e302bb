"""A network in torch, ONNX Runtime or OpenVINO: sessions, paired timing, and the rank grid of the hardware."""

from spectrim.runtimes.sessions import RUNTIMES, Runtime, RuntimeName, Session, fingerprint, require_runtime

__all__ = ["RUNTIMES", "Runtime", "RuntimeName", "Session", "fingerprint", "require_runtime"]
