#!/bin/sh
# Called by the openssl-src crate in place of perl, which it runs once: for OpenSSL's Configure.
# Leaves out what the agent never uses, and takes paths and dates out of what is compiled in.
set -eu
[ "$1" = ./Configure ] || exec perl "$@"
shift
# Ciphers and digests that no TLS 1.2 or 1.3 connection of the agent negotiates, formats that it does
# not read, and protocols that it does not speak. Error texts stay: operators need them.
left_out='aria bf blake2 cast idea md4 mdc2 rc2 rc4 rmd160 seed siphash siv sm2 sm3 sm4 whirlpool
    argon2 scrypt ocb des dsa ec2m gost lms ml-dsa slh-dsa
    cmp cms ct ocsp rfc3779 ts
    dtls quic srp srtp psk ssl-trace tls1 tls1_1 nextprotoneg multiblock
    apps docs dso filenames thread-pool default-thread-pool ui-console'
options=
for name in $left_out; do
    options="$options no-$name"
done
# shellcheck disable=SC2086 # one argument each
perl ./Configure "$@" $options
# The directories of loadable modules, of which there are none, would be below the build directory.
# `OpenSSL_version` would tell the compiler's path, its flags and the date.
# shellcheck disable=SC2016 # make's variables
sed -i \
    -e 's|^ENGINESDIR=.*|ENGINESDIR=/usr/local/ssl/engines|' \
    -e 's|^MODULESDIR=.*|MODULESDIR=/usr/local/ssl/modules|' \
    -e 's|util/mkbuildinf.pl "[^"]*" "\$(PLATFORM)"|util/mkbuildinf.pl "" ""|' \
    Makefile
