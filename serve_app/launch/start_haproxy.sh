#!/bin/sh
# Rewrites the configuration that Ray Serve generated (haproxy_rules.py), then becomes the HAProxy
# of ray[serve] ($SERVE_APP_HAPROXY). Ray Serve runs this file instead of HAProxy.
exec "${SERVE_APP_PYTHON:-python3}" -I -S "${0%/*}/haproxy_rules.py" "$@"
