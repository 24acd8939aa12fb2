SUMMARY = "Runs tasks for a control plane and loses nothing"
DESCRIPTION = "Takes shell tasks from a control plane, runs them, streams their output live \
and keeps every chunk and result until it is acknowledged."
LICENSE = "MIT | Apache-2.0"
LIC_FILES_CHKSUM = "file://LICENSE-MIT;md5=a4ca7187f6eb544027db756d55cc1955 \
                    file://LICENSE-APACHE;md5=1836efb2eb779966696f473ee8540542"
PV = "0.1.0"

inherit cargo externalsrc pkgconfig systemd update-rc.d

# The source tree that this layer lies in. The crates come from the network (or `cargo vendor`).
EXTERNALSRC = "${@os.path.abspath(d.getVar('THISDIR') + '/../../../../..')}"
EXTERNALSRC_BUILD = "${WORKDIR}/build"
do_compile[network] = "1"

DEPENDS = "openssl"
RDEPENDS:${PN} = "ca-certificates"
CARGO_BUILD_FLAGS += "--no-default-features"
CARGO_SRC_DIR = ""

SYSTEMD_SERVICE:${PN} = "hostlink-edge.service"
INITSCRIPT_NAME = "hostlink-edge"
CONFFILES:${PN} = "${sysconfdir}/hostlink/hostlink.env"

do_install:append() {
    install -d ${D}${sysconfdir}/hostlink
    install -m 0600 ${S}/targets/packages/hostlink.env ${D}${sysconfdir}/hostlink/
    if ${@bb.utils.contains('DISTRO_FEATURES', 'systemd', 'true', 'false', d)}; then
        install -d ${D}${systemd_system_unitdir}
        install -m 0644 ${S}/targets/packages/systemd/hostlink-edge.service \
            ${D}${systemd_system_unitdir}/
    else
        install -d ${D}${sysconfdir}/init.d
        install -m 0755 ${S}/targets/packages/sysv/hostlink-edge ${D}${sysconfdir}/init.d/
    fi
}

FILES:${PN} += "${systemd_system_unitdir}"
