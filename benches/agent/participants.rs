//! Who has used the processors in a work: the agent, its task, the gateway, and the rest, which is
//! mostly the kernel (writing back, and the network's other half).

use crate::process::{Agent, Machine, Usage};
use crate::table::{Row, Target, row};

#[derive(Debug, Clone, Copy)]
pub struct Moment {
    pub agent: Usage,
    machine: Machine,
}

impl Moment {
    pub fn now(agent: &Agent) -> Result<Moment, String> {
        Ok(Moment {
            agent: agent.usage()?,
            machine: Machine::read()?,
        })
    }
}

/// The share of the machine's processors in use, and the seconds of each participant.
pub fn rows(begin: &Moment, end: &Moment) -> Vec<Row> {
    let (from, to) = (&begin.agent, &end.agent);
    let kernel = to.system_seconds - from.system_seconds;
    let agent = to.cpu_seconds - from.cpu_seconds;
    let task = to.tasks_seconds - from.tasks_seconds;
    let gateway = end.machine.own_seconds - begin.machine.own_seconds;
    let busy = end.machine.busy_seconds - begin.machine.busy_seconds;
    let all = end.machine.all_seconds - begin.machine.all_seconds;
    let shown = |figure, value, unit| row("its processors", figure, value, unit, Target::None);
    vec![
        shown("of all cores in use", 100.0 * busy / all.max(0.01), "%"),
        shown("agent, outside the kernel", agent - kernel, "s"),
        shown("agent, in the kernel", kernel, "s"),
        shown("task", task, "s"),
        shown("gateway", gateway, "s"),
        shown("all else", (busy - agent - task - gateway).max(0.0), "s"),
    ]
}
