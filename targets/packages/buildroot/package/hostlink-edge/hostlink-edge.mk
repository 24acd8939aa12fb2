################################################################################
#
# hostlink-edge
#
################################################################################

# Use: make BR2_EXTERNAL=<source tree>/targets/packages/buildroot menuconfig
# The crates come from the network, or from `cargo vendor` in the source tree.
HOSTLINK_EDGE_SOURCE_TREE = $(BR2_EXTERNAL_HOSTLINK_PATH)/../../..
HOSTLINK_EDGE_VERSION = $(shell sed -n 's/^version = "\(.*\)"/\1/p' $(HOSTLINK_EDGE_SOURCE_TREE)/Cargo.toml | head -n 1)
HOSTLINK_EDGE_SITE = $(HOSTLINK_EDGE_SOURCE_TREE)
HOSTLINK_EDGE_SITE_METHOD = local
HOSTLINK_EDGE_LICENSE = MIT or Apache-2.0
HOSTLINK_EDGE_LICENSE_FILES = LICENSE-MIT LICENSE-APACHE
HOSTLINK_EDGE_DEPENDENCIES = host-pkgconf openssl
HOSTLINK_EDGE_CARGO_BUILD_OPTS = --no-default-features
HOSTLINK_EDGE_CARGO_INSTALL_OPTS = --no-default-features

define HOSTLINK_EDGE_INSTALL_SETTINGS
	$(INSTALL) -D -m 0600 $(@D)/targets/packages/hostlink.env \
		$(TARGET_DIR)/etc/hostlink/hostlink.env
endef
HOSTLINK_EDGE_POST_INSTALL_TARGET_HOOKS += HOSTLINK_EDGE_INSTALL_SETTINGS

define HOSTLINK_EDGE_INSTALL_INIT_SYSV
	$(INSTALL) -D -m 0755 $(@D)/targets/packages/sysv/hostlink-edge \
		$(TARGET_DIR)/etc/init.d/S90hostlink-edge
endef

define HOSTLINK_EDGE_INSTALL_INIT_SYSTEMD
	$(INSTALL) -D -m 0644 $(@D)/targets/packages/systemd/hostlink-edge.service \
		$(TARGET_DIR)/usr/lib/systemd/system/hostlink-edge.service
endef

$(eval $(cargo-package))
