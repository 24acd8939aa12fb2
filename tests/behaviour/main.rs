//! End-to-end behaviour: the real binary against a scripted control plane, over real sockets. One
//! module a behaviour, named after it.

mod support;

mod ack_removes_exactly_that_message;
mod bad_commands;
mod big_output_with_cuts;
mod capture_flush;
mod clock_offset;
mod delivery_answers;
mod environment;
mod fallback_report;
mod final_texts;
mod full_disk;
mod gap_error_never_taken;
mod gap_error_replays_once;
mod hello_directives;
mod hostile_server;
mod invalid_frames_end_the_session;
mod kill_nine_leaves_no_process;
mod kill_nine_prefix;
mod no_process_is_left;
mod notify;
mod null_directives;
mod odd_tasks;
mod poison_message;
mod polling_gate;
mod queue;
mod reconnect_replays_same_messages;
mod registration;
mod restart_in_each_state;
mod retryable_error_keeps_connection;
mod runs_once;
mod second_agent_exit_75;
mod sigterm_stops_cleanly;
mod storage_faults;
mod task_cgroups;
mod task_surroundings;
mod ten_thousand_tasks;
mod tls_private_ca;
mod unknown_message_type;
mod volatile_store;
mod window;
