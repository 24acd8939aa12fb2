//! Bodies of requests and answers: bounded when read, whole or live when written.

use std::pin::Pin;
use std::task::{Context, Poll};

use async_channel::Receiver;
use futures_lite::Stream;
use http_body_util::{BodyExt, Limited};
use hyper::body::{Body, Bytes, Frame, Incoming};
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::{Request, Response, StatusCode};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::hub::Refusal;
use crate::limits::GATEWAY_REQUEST_TIMEOUT;
use crate::wire::http::ErrorResponse;

/// Body of an answer.
pub enum AnswerBody {
    Whole(Option<Bytes>),
    /// Parts as they come; the end of the channel is the end of the body.
    Live(Pin<Box<Receiver<Bytes>>>),
}

impl Body for AnswerBody {
    type Data = Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        match self.get_mut() {
            AnswerBody::Whole(bytes) => Poll::Ready(bytes.take().map(|b| Ok(Frame::data(b)))),
            AnswerBody::Live(parts) => parts
                .as_mut()
                .poll_next(context)
                .map(|part| part.map(|bytes| Ok(Frame::data(bytes)))),
        }
    }

    fn size_hint(&self) -> hyper::body::SizeHint {
        match self {
            AnswerBody::Whole(bytes) => {
                let length = bytes.as_ref().map_or(0, Bytes::len);
                hyper::body::SizeHint::with_exact(length as u64)
            }
            AnswerBody::Live(_) => hyper::body::SizeHint::default(),
        }
    }
}

pub type Answer = Response<AnswerBody>;

fn answer(status: StatusCode, content_type: &'static str, body: AnswerBody) -> Answer {
    let mut answer = Response::new(body);
    *answer.status_mut() = status;
    let content_type = HeaderValue::from_static(content_type);
    answer.headers_mut().insert(CONTENT_TYPE, content_type);
    answer
}

/// 200 with a JSON body.
pub fn json(value: &impl Serialize) -> Answer {
    let body = serde_json::to_vec(value).expect("API types have string keys and write to memory");
    let body = AnswerBody::Whole(Some(body.into()));
    answer(StatusCode::OK, "application/json", body)
}

/// A refusal with `{"error": …}`.
pub fn refusal((status, error): Refusal) -> Answer {
    let mut refused = json(&ErrorResponse { error });
    *refused.status_mut() =
        StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    refused
}

/// 200 with lines of JSON that come as they come.
pub fn live(parts: Receiver<Bytes>) -> Answer {
    let body = AnswerBody::Live(Box::pin(parts));
    answer(StatusCode::OK, "application/x-ndjson", body)
}

/// Reads a whole body of at most `limit` bytes.
pub async fn read(request: Request<Incoming>, limit: usize) -> Result<Bytes, Refusal> {
    let announced = request.body().size_hint().lower();
    if announced > limit as u64 {
        return Err((413, format!("the body is longer than {limit} bytes")));
    }
    let body = Limited::new(request.into_body(), limit).collect();
    let timeout = async {
        smol::Timer::after(GATEWAY_REQUEST_TIMEOUT).await;
        None
    };
    match futures_lite::future::or(async { Some(body.await) }, timeout).await {
        None => Err((408, "the body did not come in time".into())),
        Some(Ok(body)) => Ok(body.to_bytes()),
        Some(Err(error)) if error.is::<http_body_util::LengthLimitError>() => {
            Err((413, format!("the body is longer than {limit} bytes")))
        }
        Some(Err(error)) => Err((400, format!("the body could not be read: {error}"))),
    }
}

/// A body as JSON.
pub fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, Refusal> {
    serde_json::from_slice(body).map_err(|error| (400, format!("the body is refused: {error}")))
}
