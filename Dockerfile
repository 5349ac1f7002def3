# Weir's one image: four static programs and nothing else. `make image` builds
# it; nothing is pulled. There is no entrypoint: the manifests say what runs.
FROM scratch
COPY out/bin/weir-agent out/bin/weir-cni out/bin/weir-install out/bin/weir-proxy /
