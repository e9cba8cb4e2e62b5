"""Errors of boto3, translated for the person who has to fix them."""

from botocore.exceptions import (
    ClientError,
    ConnectionError,
    CredentialRetrievalError,
    HTTPClientError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
    ProfileNotFound,
)

_CREDENTIALS = "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, in the environment."
_ENDPOINT = "Start the server, or set storage.endpoint in params.yaml to 'embedded', 'aws', or a URL in reach."
_BUCKET = "Create it, or set storage.bucket in params.yaml to one that exists."
_REGION = "Set storage.region in params.yaml to the bucket's region."
_ALLOW = "Ask for s3:GetObject, s3:PutObject, s3:DeleteObject and s3:ListBucket on it, or use other credentials."

_REFUSALS = {
    "InvalidAccessKeyId": ("the access key is unknown there", _CREDENTIALS),
    "SignatureDoesNotMatch": ("the secret key is wrong", _CREDENTIALS),
    "InvalidToken": ("the session token is not valid", "Log in again, or unset AWS_SESSION_TOKEN."),
    "ExpiredToken": ("the credentials have expired", "Log in again."),
    "RequestTimeTooSkewed": ("this machine's clock is wrong", "Set the clock."),
    "AccessDenied": ("access is denied", _ALLOW),
    "403": ("access is denied", _ALLOW),
    "NoSuchBucket": ("there is no such bucket", _BUCKET),
    "404": ("there is no such bucket", _BUCKET),
    "InvalidBucketName": ("a bucket's name is 3 to 63 of a-z, 0-9, '-', '.'", "Change storage.bucket in params.yaml."),
    "NoSuchKey": ("the object is not there", "Run the stage that stores it again."),
    "PermanentRedirect": ("the bucket is in another region", _REGION),
    "301": ("the bucket is in another region", _REGION),
    "AuthorizationHeaderMalformed": ("the bucket is in another region", _REGION),
    "BadDigest": ("the content was damaged on the way", "Run again."),
    "SlowDown": ("the server asks for fewer requests", "Run again later."),
}

_MISSING = frozenset({"NoSuchKey", "404"})

# The last line: the content was damaged on its way, or the answer that completed an upload in parts was lost and the
# request repeated.
_PASSING = frozenset(
    {"SlowDown", "RequestTimeout", "OperationAborted", "Throttling", "PreconditionFailed"}
    | {"BadDigest", "IncompleteBody", "XAmzContentSHA256Mismatch", "NoSuchUpload"}
)


def explain(error: BaseException) -> tuple[str, str]:
    """Return cause and remedy of an error of boto3, in words that contain no secret."""
    if isinstance(error, ClientError):
        unknown = (f"the server answered {code(error) or 'an error'}", "Look into the server's log, then run again.")
        return _REFUSALS.get(code(error), unknown)
    if isinstance(error, NoCredentialsError | PartialCredentialsError | CredentialRetrievalError):
        return "no complete credentials were found", _CREDENTIALS
    if isinstance(error, ProfileNotFound):
        return f"the profile '{error.kwargs.get('profile')}' is unknown", "Create it, or unset AWS_PROFILE."
    if isinstance(error, HTTPClientError | ConnectionError):
        return f"the server does not answer as it should ({type(error).__name__})", _ENDPOINT
    if isinstance(error, ParamValidationError):
        return _REFUSALS["InvalidBucketName"]
    return f"{error}", _ENDPOINT


def code(error: ClientError) -> str:
    """Return the error code that the server gave, e.g. `AccessDenied`; a bare status such as `404` if it gave none."""
    return str(error.response.get("Error", {}).get("Code", ""))


def is_missing(error: BaseException) -> bool:
    """Return whether the object does not exist."""
    return isinstance(error, ClientError) and code(error) in _MISSING


def is_refusal(error: BaseException) -> bool:
    """Return whether the server would refuse again: it does not grant access, or does not know the place."""
    if isinstance(error, ClientError):
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return 300 <= status < 500 and code(error) not in _PASSING
    return isinstance(error, NoCredentialsError | PartialCredentialsError | ProfileNotFound | ParamValidationError)
