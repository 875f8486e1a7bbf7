# docker build -t kvs:3.0 .
# docker run -p 13800:13800 -e ADDRESS=10.10.0.4:13800 -e VIEW=10.10.0.4:13800,10.10.0.5:13800 \
#     --network kv --ip 10.10.0.4 kvs:3.0
#
# The program is linked without shared libraries, so that nothing else needs to be in the image.
# Where no base image can be pulled: docker/Dockerfile.scratch.
FROM rust:1-slim-bookworm AS build
WORKDIR /src
COPY Cargo.toml Cargo.lock ./
COPY src src
COPY benches benches
COPY sim sim
# With a target named, the flag is not that of build scripts and procedural macros, which need
# shared libraries.
RUN host="$(rustc -vV | sed -n 's/^host: //p')" \
    && RUSTFLAGS="-C target-feature=+crt-static" \
       cargo build --release --locked --bin quorate --target "$host" \
    && mkdir -p /image/data \
    && cp "target/$host/release/quorate" /image/quorate

FROM scratch
COPY --from=build --chown=65532:65532 /image /
USER 65532:65532
EXPOSE 13800
VOLUME /data
WORKDIR /data
# One of its own ADDRESS, or of a gateway:
# docker run --health-cmd '/quorate health 127.0.0.1:8080' ...
HEALTHCHECK --interval=5s --timeout=4s --start-period=10s CMD ["/quorate", "health"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["/quorate"]
# It listens on every address of the container: a published port must reach it, whatever ADDRESS is.
CMD ["serve", "--ip", "0.0.0.0", "--data-dir", "/data"]
