"""Patch files per pinned package version; `launch.patching` applies them."""
