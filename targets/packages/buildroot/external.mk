include $(sort $(wildcard $(BR2_EXTERNAL_HOSTLINK_PATH)/package/*/*.mk))
