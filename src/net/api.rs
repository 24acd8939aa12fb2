//! The HTTP calls of PROTOCOL.md 2, typed.
//!
//! A signed call that is answered 401 corrects the clock by the answer's `Date`, is signed anew
//! and sent once more; what comes then is the result.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use hyper::body::Bytes;
use hyper::{Method, header};

use super::clock::ServerClock;
use super::dial::Dialer;
use super::error::{NetError, retry_after};
use super::http::{HttpAnswer, HttpClient, HttpRequest};
use super::signature::Signer;
use crate::wire::http::{
    PolledTasks, REGISTER_PATH, RegisterRequest, RegisterResponse, Report, TASKS_PATH,
    decode_heartbeat, decode_tasks, heartbeat_path, report_path,
};

pub struct Api {
    client: HttpClient,
    clock: ServerClock,
    signer: RefCell<Option<Rc<Signer>>>,
    tls: bool,
}

/// Both are tried again, with backoff.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RegisterError {
    /// The server does not want this device or this token: an operator must act.
    Refused(NetError),
    /// No answer, or one that says that it is the server's trouble.
    Failed(NetError),
}

impl std::fmt::Display for RegisterError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            RegisterError::Refused(error) | RegisterError::Failed(error) => error.fmt(f),
        }
    }
}

impl RegisterError {
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            RegisterError::Refused(error) | RegisterError::Failed(error) => error.retry_after,
        }
    }
}

/// What became of a report (PROTOCOL.md 2, Report).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ReportOutcome {
    /// The server has it.
    Done,
    /// 413: again with half the output.
    TooLarge,
    /// Another 4xx: never again.
    Refused { status: u16, why: String },
    /// Network error, 5xx, 408, 429, 401 also with the right time, or a redirect: again with
    /// backoff, not before `after`.
    Retry {
        after: Option<Duration>,
        why: String,
    },
}

impl Api {
    /// Calls to the control plane of the dialer's settings.
    pub fn new(dialer: Rc<Dialer>, clock: ServerClock) -> Api {
        let base = dialer.settings().control_plane.clone();
        Api {
            tls: base.tls,
            client: HttpClient::new(dialer, base),
            clock,
            signer: RefCell::default(),
        }
    }

    /// Who all further calls are from; to be set before any but `register`.
    pub fn set_signer(&self, signer: Rc<Signer>) {
        *self.signer.borrow_mut() = Some(signer);
    }

    /// Closes a connection that has been idle for too long; to be called now and then, since
    /// nothing runs here between the calls.
    pub fn close_idle(&self) {
        self.client.close_idle();
    }

    /// Unsigned: the token in the request is what authenticates it.
    pub async fn register(
        &self,
        request: &RegisterRequest,
    ) -> Result<RegisterResponse, RegisterError> {
        let body = serde_json::to_vec(request).expect("strings are JSON");
        let request = HttpRequest {
            method: Method::POST,
            path: REGISTER_PATH.to_string(),
            headers: Vec::new(),
            body: Some(Bytes::from(body)),
        };
        let answer = self
            .client
            .request(&request)
            .await
            .map_err(RegisterError::Failed)?;
        match answer.status {
            200..=299 => {
                let response: RegisterResponse = self
                    .decoded(&request, &answer, |body| serde_json::from_slice(body))
                    .map_err(RegisterError::Failed)?;
                if response.id.is_empty() {
                    return Err(RegisterError::Failed(self.unexpected(
                        &request,
                        &answer,
                        "the answer holds no agent id",
                    )));
                }
                Ok(response)
            }
            408 | 429 => Err(RegisterError::Failed(self.refused(&request, &answer))),
            400..=499 => Err(RegisterError::Refused(self.refused(&request, &answer))),
            _ => Err(RegisterError::Failed(self.refused(&request, &answer))),
        }
    }

    pub async fn poll(&self) -> Result<PolledTasks, NetError> {
        let (request, answer) = self
            .signed(Method::GET, |_| TASKS_PATH.to_string(), None)
            .await?;
        match answer.status {
            200..=299 => self.decoded(&request, &answer, decode_tasks),
            _ => Err(self.refused(&request, &answer)),
        }
    }

    pub async fn heartbeat(&self) -> Result<PolledTasks, NetError> {
        let (request, answer) = self.signed(Method::POST, heartbeat_path, None).await?;
        match answer.status {
            // An old server may answer with nothing.
            200..=299 if answer.body.as_ref().is_ok_and(Vec::is_empty) => Ok(Vec::new()),
            200..=299 => self.decoded(&request, &answer, decode_heartbeat),
            _ => Err(self.refused(&request, &answer)),
        }
    }

    /// A success counts as soon as its status has arrived: the rest of the answer says nothing.
    pub async fn report(&self, task_id: &str, report: &Report<'_>) -> ReportOutcome {
        let body = serde_json::to_vec(report).expect("strings and numbers are JSON");
        let body = Some(Bytes::from(body));
        let sent = self
            .signed(Method::PUT, |_| report_path(task_id), body)
            .await;
        let (request, answer) = match sent {
            Ok(exchanged) => exchanged,
            Err(error) => {
                return ReportOutcome::Retry {
                    after: error.retry_after,
                    why: error.why,
                };
            }
        };
        let refusal = || self.refused(&request, &answer);
        match answer.status {
            200..=299 => ReportOutcome::Done,
            413 => ReportOutcome::TooLarge,
            401 | 408 | 429 => ReportOutcome::Retry {
                after: refusal().retry_after,
                why: refusal().why,
            },
            status @ 400..=499 => ReportOutcome::Refused {
                status,
                why: refusal().why,
            },
            _ => ReportOutcome::Retry {
                after: refusal().retry_after,
                why: refusal().why,
            },
        }
    }

    async fn signed(
        &self,
        method: Method,
        path: impl FnOnce(&str) -> String,
        body: Option<Bytes>,
    ) -> Result<(HttpRequest, HttpAnswer), NetError> {
        let signer = self.signer.borrow().clone();
        let signer = signer.ok_or_else(|| NetError::new("the agent is not registered yet"))?;
        let mut request = HttpRequest {
            method,
            path: path(signer.agent_id()),
            headers: Vec::from(signer.headers()?),
            body,
        };
        let mut answer = self.client.request(&request).await?;
        if answer.status == 401 {
            let date = answer.header(header::DATE);
            if date.is_some_and(|date| self.clock.learn(date, self.tls)) {
                request.headers = Vec::from(signer.headers()?);
                answer = self.client.request(&request).await?;
            }
        }
        if answer.status < 300 {
            self.clock.told(answer.header(header::DATE), self.tls);
        }
        Ok((request, answer))
    }

    fn decoded<T>(
        &self,
        request: &HttpRequest,
        answer: &HttpAnswer,
        decode: impl FnOnce(&[u8]) -> Result<T, serde_json::Error>,
    ) -> Result<T, NetError> {
        let body = answer
            .body
            .as_ref()
            .map_err(|reason| self.unexpected(request, answer, reason))?;
        decode(body).map_err(|error| {
            self.unexpected(
                request,
                answer,
                &format!("the answer cannot be read: {error}"),
            )
        })
    }

    fn unexpected(&self, request: &HttpRequest, answer: &HttpAnswer, reason: &str) -> NetError {
        NetError {
            why: format!("{} {}: {reason}", request.method, request.path),
            retry_after: None,
            status: Some(answer.status),
        }
    }

    fn refused(&self, request: &HttpRequest, answer: &HttpAnswer) -> NetError {
        let retry_after = answer
            .header(header::RETRY_AFTER)
            .and_then(|value| retry_after(value, self.clock.now_unix()));
        let advice = match answer.status {
            400..=499 if request.path == REGISTER_PATH => {
                "; check HOSTLINK_TOKEN_ID and HOSTLINK_TOKEN_KEY"
            }
            401 => {
                "; the server does not accept this agent's signature: if the agent was removed \
                 there, delete agent.json to register again"
            }
            _ => "",
        };
        let mut error = self.unexpected(
            request,
            answer,
            &format!("the server answered {}{advice}", answer.described()),
        );
        error.retry_after = retry_after;
        error
    }
}

#[cfg(test)]
mod tests;
