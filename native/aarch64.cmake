# Toolchain of `make test-arm`: the C++ programs for 64-bit ARM, built with Debian's cross compiler
# (g++-aarch64-linux-gnu). They are static, so that qemu-aarch64 (qemu-user) or any ARM machine runs them as they are.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_EXE_LINKER_FLAGS_INIT -static)
