//! Staging and commits by several at a time, on the hub and the storage thread.

use std::rc::Rc;

use smol::LocalExecutor;

use super::store::{close, open, task};
use super::support::{Directory, run};
use crate::gateway::commits::Batch;
use crate::gateway::hub::Hub;
use crate::gateway::journal::{self, Header, Kind};
use crate::gateway::settings::Options;
use crate::gateway::store::{Append, Loaded};

/// A hub with one task, whose journal ends at what is returned.
async fn hub(executor: &Rc<LocalExecutor<'static>>, directory: &Directory) -> (Rc<Hub>, u64) {
    let opened = open(directory);
    let length = opened.store.create_task(task()).await.unwrap();
    close(opened).await;
    let (_, stopping) = async_channel::bounded(1);
    let weak = Rc::downgrade(executor);
    let options = Options::default();
    let hub = Hub::new(open(directory), options, None, stopping, weak);
    assert!(hub.load("t").await.unwrap());
    (Rc::new(hub), length)
}

fn stage(hub: &Hub, batch: &mut Batch, kind: Kind) {
    hub.stage(batch, "t", Header::plain(kind, b"why"), b"why");
}

async fn stored(hub: &Hub) -> Loaded {
    hub.store.load("t").await.unwrap().unwrap()
}

#[test]
fn a_commit_hands_over_what_others_have_staged_before() {
    run(async |executor| {
        let directory = Directory::new();
        let (hub, _) = hub(&executor, &directory).await;
        let (mut session, mut operator) = (Batch::default(), Batch::default());
        stage(&hub, &mut session, Kind::Received);
        stage(&hub, &mut operator, Kind::Cancel);
        hub.commit_and_wait(operator).await.unwrap();
        let loaded = stored(&hub).await;
        assert_eq!(loaded.attempt.info().status, "received");
        assert_eq!(loaded.attempt.cancel_reason.as_deref(), Some("why"));
        hub.commit_and_wait(session).await.unwrap();
        assert_eq!(stored(&hub).await.length, loaded.length);
    });
}

#[test]
fn a_repeat_is_answered_when_the_first_is_durable() {
    run(async |executor| {
        let directory = Directory::new();
        let (hub, _) = hub(&executor, &directory).await;
        let (mut first, mut repeat) = (Batch::default(), Batch::default());
        stage(&hub, &mut first, Kind::Received);
        hub.touch(&mut repeat, "t");
        hub.commit_and_wait(repeat).await.unwrap();
        assert_eq!(stored(&hub).await.attempt.info().status, "received");
    });
}

#[test]
fn what_is_staged_on_a_failed_append_fails_too() {
    run(async |executor| {
        let directory = Directory::new();
        let (hub, length) = hub(&executor, &directory).await;
        let (mut first, mut second, mut third) = Default::default();
        stage(&hub, &mut first, Kind::Received);
        // The journal is not as long as the hub believes.
        let mut records = Vec::new();
        journal::append(&mut records, Header::plain(Kind::Started, b""), b"");
        let stranger = Append {
            key: task().key(),
            offset: length,
            records,
        };
        let done = hub.store.append(vec![stranger]).await.unwrap();
        done.recv().await.unwrap().unwrap();
        let failed = hub.commit(first);
        stage(&hub, &mut second, Kind::Cancel);
        let behind = hub.commit(second);
        hub.touch(&mut third, "t");
        assert!(failed.recv().await.unwrap().is_err());
        assert!(behind.recv().await.unwrap().is_err());
        assert!(hub.commit_and_wait(third).await.is_err());

        let mut again = Batch::default();
        stage(&hub, &mut again, Kind::Cancel);
        hub.commit_and_wait(again).await.unwrap();
        let loaded = stored(&hub).await;
        assert_eq!(loaded.attempt.info().status, "running");
        assert!(loaded.attempt.cancel_reason.is_some());
    });
}
