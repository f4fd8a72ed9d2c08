"""Qwen2.5 on EKS through KubeRay: manifests, and the commands around them."""
