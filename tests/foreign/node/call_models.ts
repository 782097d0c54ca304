// SPDX-License-Identifier: Apache-2.0
//
// Calls a Thirdrail server from Node, with stubs generated from protos/thirdrail/v1.
//
//     node call_models.js 127.0.0.1:8001
//     node call_models.js unix:/run/user/1000/thirdrail/grpc.sock
//
// Prints what came back as one JSON object.
import { credentials, Metadata, type ServiceError, status } from "@grpc/grpc-js";

import {
  InferenceClient,
  InferRequest,
  InferResponse,
  InferStreamRequest,
  InferStreamResponse,
  Reason,
} from "./generated/thirdrail/v1/inference";
import { ListResponse, ModelsClient, ModelState } from "./generated/thirdrail/v1/models";
import { DataType, Tensor } from "./generated/thirdrail/v1/tensor";

const MIB = 1 << 20;
const OPTIONS = { "grpc.max_receive_message_length": 64 * MIB };

// Tensors are little-endian, and so is every machine that Node runs on today.
function floats(name: string, shape: number[], values: number[]): Tensor {
  const bytes = new Uint8Array(new Float32Array(values).buffer);
  return Tensor.fromPartial({
    name,
    dataType: DataType.DATA_TYPE_FP32,
    shape: shape.map(BigInt),
    data: { $case: "raw", value: bytes },
  });
}

function turns(count: number): Tensor {
  const bytes = new Uint8Array(new BigInt64Array([BigInt(count)]).buffer);
  return Tensor.fromPartial({
    name: "turns",
    dataType: DataType.DATA_TYPE_INT64,
    data: { $case: "raw", value: bytes },
  });
}

function floatsOf(response: InferResponse): number[] {
  const data = response.outputs[0].data;
  if (data?.$case !== "raw") throw new Error("expected raw bytes");
  const bytes = new Uint8Array(data.value); // a copy at the start of its own memory, and so aligned
  return [...new Float32Array(bytes.buffer)];
}

// The generated client takes callbacks; a promise reads better.
function infer(client: InferenceClient, request: InferRequest, timeoutMs = 30_000): Promise<InferResponse> {
  return new Promise((resolve, reject) => {
    const options = { deadline: Date.now() + timeoutMs };
    client.infer(request, new Metadata(), options, (error, response) =>
      error ? reject(error) : resolve(response),
    );
  });
}

async function failureOf(call: Promise<unknown>): Promise<{ code: string; details: string }> {
  try {
    await call;
  } catch (error) {
    const { code, details } = error as ServiceError;
    return { code: status[code], details };
  }
  throw new Error("the call was not refused");
}

function readyModels(client: ModelsClient): Promise<string[]> {
  return new Promise((resolve, reject) =>
    client.list({ readyOnly: true }, (error: ServiceError | null, response: ListResponse) =>
      error
        ? reject(error)
        : resolve(
            response.models
              .filter((model) => model.state === ModelState.MODEL_STATE_READY)
              .map((model) => model.name),
          ),
    ),
  );
}

// Many requests in flight on one stream. Answers carry the `call` of their request and may overtake one
// another: the slow request is cancelled while it runs, and the quick ones do not wait for it.
function stream(client: InferenceClient, quick: number): Promise<Record<string, unknown>> {
  const slow = 1000n;
  return new Promise((resolve, reject) => {
    const answers: Record<string, unknown> = {};
    const call = client.inferStream();
    const send = (request: Partial<InferRequest>) =>
      call.write(
        InferStreamRequest.fromPartial({ message: { $case: "infer", value: request as InferRequest } }),
      );
    call.on("data", ({ message }: InferStreamResponse) => {
      if (message?.$case !== "infer") return;
      const answer = message.value;
      const reason = answer.status?.reason;
      answers[String(answer.call)] = reason ? Reason[reason] : floatsOf(answer)[0];
      if (Object.keys(answers).length === quick + 1) {
        call.write(
          InferStreamRequest.fromPartial({ message: { $case: "cancel", value: { call: slow } } }),
        );
        call.end();
      }
    });
    call.on("error", reject);
    call.on("end", () => resolve(answers));

    send({ call: slow, modelName: "slow", inputs: [floats("x", [1], [0]), turns(100_000)] });
    for (let i = 0; i < quick; i++)
      send({ call: BigInt(i), modelName: "plus_one", inputs: [floats("a", [1, 4], [i, i, i, i])] });
    send({ call: 500n, modelName: "unheard_of" });
  });
}

async function main(address: string): Promise<void> {
  const client = new InferenceClient(address, credentials.createInsecure(), OPTIONS);
  const models = new ModelsClient(address, credentials.createInsecure(), OPTIONS);

  const request = InferRequest.fromPartial({
    modelName: "plus_one",
    requestId: "from node",
    inputs: [floats("a", [1, 4], [1, 2, 3, 4])],
  });
  const response = await infer(client, request);
  const slow = InferRequest.fromPartial({
    modelName: "slow",
    inputs: [floats("x", [1], [0]), turns(100_000)],
  });
  const large = InferRequest.fromPartial({
    modelName: "identity_fp32",
    inputs: [floats("x", [2 * MIB], new Array(2 * MIB).fill(7))],
  });

  console.log(
    JSON.stringify({
      models: await readyModels(models),
      outputs: floatsOf(response),
      requestId: response.requestId,
      version: Number(response.modelVersion),
      large: floatsOf(await infer(client, large)).every((value) => value === 7),
      unknown: await failureOf(infer(client, InferRequest.fromPartial({ modelName: "unheard_of" }))),
      late: await failureOf(infer(client, slow, 200)),
      stream: await stream(client, 8),
    }),
  );
  client.close();
  models.close();
}

void main(process.argv[2]);
