"""A network in torch, ONNX Runtime or OpenVINO: sessions, paired timing, and the rank grid of the hardware."""

from spectrim.runtimes.sessions import RUNTIMES, RuntimeName, Session, fingerprint, from_onnx, prepare, require_runtime

__all__ = ["RUNTIMES", "RuntimeName", "Session", "fingerprint", "from_onnx", "prepare", "require_runtime"]
